"""Results of attention that a layer keeps although it runs again in the backward pass.

At 32,768 tokens attention takes a third of a layer's forward pass, while its result is as large as one hidden state.
Autograd saves the result and the log-sum-exp for attention's own gradient anyway; both are kept from the pass without
gradients. Queries, keys and values, three quarters of what attention saves, are computed again.

The operators are recognized below autograd. Whichever of torch's kernels a pass uses (cuDNN's, flash, efficient,
variable-length attention, the CPU's), the second pass returns the kept outputs in place of calling it, and autograd
records the operator with the inputs that were computed again. The backward pass is the operator's own. Attention that
torch takes apart into products is not recognized, and runs again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Returns the attention of query, key and value."""


class KeptAttention:
    """Outputs of the attention operators of one layer and micro batch, kept from its first pass for its second.

    Rank-local.
    """

    def __init__(self) -> None:
        self._outputs: deque[tuple[Any, Any]] = deque()

    def __call__(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return `attend(query, key, value)`.

        Without gradients the outputs of its operators are kept. The next call with gradients takes them; if there are
        none, as in another backward pass through the same graph, it computes them.
        """
        if torch.is_grad_enabled():
            if not self._outputs:
                return attend(query, key, value)
            with _Return(self._outputs):
                return attend(query, key, value)
        # Without a gradient to compute, torch's attention returns no log-sum-exp. The graph is dropped at once.
        inputs = [each.detach().requires_grad_() for each in (query, key, value)]
        with torch.enable_grad(), _Keep(self._outputs):
            return attend(*inputs).detach()

    def tensors(self) -> list[Tensor]:
        """Return the kept tensors."""
        return [each for _, outputs in self._outputs for each in outputs if isinstance(each, Tensor)]


class _Mode(TorchDispatchMode):
    """A mode with the outputs of attention operators, the oldest first."""

    def __init__(self, outputs: deque[tuple[Any, Any]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._outputs = outputs

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: torch would wrap each mode for its compiler, which the wrapper imports at the first call."""
        return False


class _Keep(_Mode):
    """Appends the outputs of attention operators to `outputs`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_attention(func):
            # The result itself becomes part of autograd's graph, which holds queries, keys and values.
            self._outputs.append((func, tree_map_only(Tensor, Tensor.detach, result)))
        return result


class _Return(_Mode):
    """Returns `outputs` in place of calling attention operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_attention(func):
            return func(*args, **(kwargs or {}))
        kept, result = self._outputs.popleft()
        assert kept is func, f"the first pass called {kept}, the second one {func}"
        return result


def _is_attention(func: Any) -> bool:
    name: str = func.name()
    return "attention" in name or "attn" in name
