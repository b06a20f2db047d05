"""STAND-IN for lm-eval's base classes of models."""

import abc
from types import SimpleNamespace


class LM(abc.ABC):
    """A model. One that computes each request on all its processes has rank 0 of 1 everywhere."""

    rank, world_size = 0, 1

    @abc.abstractmethod
    def loglikelihood(self, requests: list[SimpleNamespace]) -> list[tuple[float, bool]]: ...

    @abc.abstractmethod
    def loglikelihood_rolling(self, requests: list[SimpleNamespace]) -> list[float]: ...

    @abc.abstractmethod
    def generate_until(self, requests: list[SimpleNamespace]) -> list[str]: ...


class TemplateLM(LM):
    """A model with a tokenizer. The end of the context that is blank belongs to the continuation."""

    @property
    @abc.abstractmethod
    def eot_token_id(self) -> int: ...

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    @abc.abstractmethod
    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]: ...

    @abc.abstractmethod
    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: object
    ) -> list[tuple[float, bool]]: ...

    def loglikelihood(self, requests: list[SimpleNamespace], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations: the ids of both texts together, without as many as the context has alone."""
        encoded = []
        for context, continuation in (each.args for each in requests):
            if context:
                before = self.tok_encode(context.rstrip())
                pair = before, self.tok_encode(context + continuation)[len(before) :]
            else:
                pair = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            encoded.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
