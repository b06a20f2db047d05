"""The error for one example that cannot be trained on."""

from __future__ import annotations

from mixtral_run.errors import ConfigError


class ExampleProblem(ConfigError):
    """An example that the template cannot take. problem: the reason in one line, without the example's place."""

    def __init__(self, problem: str, place: str | None = None) -> None:
        super().__init__("The example does not fit the chat template.", where=place, found=problem)
        self.problem = problem

    def __reduce__(self) -> tuple[type[ExampleProblem], tuple[str, str | None]]:
        return type(self), (self.problem, self.where)
