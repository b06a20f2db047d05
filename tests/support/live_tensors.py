"""The tensors that operations made and that still exist, also those that only autograd's graph holds."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """Notes the memory of each result within the mode. Python's garbage collector does not know what autograd saves."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes():
                found = StorageWeakRef(each.untyped_storage())
                # The reference keeps the address from being used again.
                self._made.setdefault(found.cdata, (found, f"{func} {tuple(each.shape)}"))
        return result

    def besides(self, kept: Iterable[torch.Tensor]) -> list[str]:
        """Return what made each tensor that exists and shares no memory with those of `kept`."""
        known = {StorageWeakRef(each.untyped_storage()).cdata for each in kept}
        return sorted(made for key, (found, made) in self._made.items() if key not in known and not found.expired())


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that operations make within the mode and that still exist, and the most so far.

    before: tensors that existed before. A view of one of them is no new storage.
    """

    def __init__(self, before: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known = {each.untyped_storage().data_ptr() for each in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._note(each.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in self._known:
            return
        self._known.add(address)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.held -= size
