"""Load the pickles of a torch_dist checkpoint without running anything that they ask for.

A pickle may name any function and have it called, and a checkpoint or adapter may come from anybody. This is the only
module of the kit that loads pickles (tests/unit/test_pickle_audit.py): `.metadata` through an unpickler that builds the
classes of such a file and nothing else, tensors through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import pickle
import re
from enum import Enum
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

UnpicklingError = pickle.UnpicklingError


class DisallowedGlobalError(pickle.UnpicklingError):
    """A pickle names a function or class that has no place in a checkpoint. It was not called."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it asks to call {name}, which has no place in a checkpoint; nothing of it was run")
        self.name = name


_SAFE = {
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
    "builtins": {"set", "frozenset"},
}


class _Ignored:
    """Stand-in for the classes that only Megatron's own caching needs."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _enum_member(owner: Any, name: str) -> Any:
    """Stand in for `getattr`, as which Python 3.11.0 to 3.11.3 pickle an enum's member; refuse other attributes."""
    if owner is _Ignored:
        return _Ignored()
    if isinstance(owner, type) and issubclass(owner, Enum):
        return owner[name]
    raise DisallowedGlobalError(f"getattr({owner!r}, {name!r})")


class MetadataUnpickler(pickle.Unpickler):
    """Build what a `.metadata` file holds; raise DisallowedGlobalError at the first name that has no place in one."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the class that a pickle names."""
        if module.startswith("megatron."):
            return _Ignored
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise DisallowedGlobalError(f"{module}.{name}")


def load_metadata(stream: IO[bytes]) -> Metadata:
    """Return the Metadata that a `.metadata` file holds.

    Raises DisallowedGlobalError for a pickle that would run something; a damaged one raises any exception.
    """
    metadata: Metadata = MetadataUnpickler(stream).load()
    return metadata


def load_tensor(stream: IO[bytes], device: str) -> object:
    """Return what torch.save wrote, on this device; `meta` loads everything but the elements.

    Raises DisallowedGlobalError for a pickle that would run something, UnpicklingError for another that torch refuses.
    """
    import torch

    try:
        return torch.load(stream, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise in_own_words(error) from None


def in_own_words(error: Exception) -> Exception:
    """Return an error of torch.load without torch's advice to load the file with weights_only=False."""
    if not isinstance(error, pickle.UnpicklingError) or isinstance(error, DisallowedGlobalError):
        return error
    found = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    if found is not None:
        return DisallowedGlobalError(found[1])
    return pickle.UnpicklingError("its pickle holds more than a tensor, or is damaged")
