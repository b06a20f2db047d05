"""torch's optimizers without torch's compiler, which they import in order to tell it what not to compile.

The import takes a second and more at the start of every job, and nothing here is compiled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch

OptimizerT = TypeVar("OptimizerT", bound=torch.optim.Optimizer)


def eager(kind: type[OptimizerT]) -> type[OptimizerT]:
    """Return the class of an optimizer without the wrappers of its methods that are for the compiler.

    torch sets whether gradients are recorded in one of them, and so does `step` here. Hooks of steps work as always:
    torch adds them to the class when the first optimizer of it is created.
    """
    original = inspect.unwrap(kind.step)

    def step(self: OptimizerT, closure: Callable[[], float] | None = None) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return original(self, closure)

    names = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in names}
    return type(kind.__name__, (kind,), {"step": step, "__doc__": kind.__doc__, **methods})


AdamW = eager(torch.optim.AdamW)
SGD = eager(torch.optim.SGD)
