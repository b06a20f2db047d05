"""The restricted unpickler reads members of enums as older Pythons pickle them, and no other attribute."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from mixtral_run.weights.torch_dist.restricted_pickle import DisallowedGlobalError, MetadataUnpickler


class ByGetattr:
    """Pickles as Python 3.11.2 (Debian 12) pickles a member of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self._words = (owner, name)

    def __reduce__(self) -> tuple[Any, tuple[Any, str]]:
        return (getattr, self._words)


def unpickled(value: object) -> object:
    return MetadataUnpickler(io.BytesIO(pickle.dumps(value))).load()


def test_an_enums_member_by_getattr_is_read() -> None:
    assert (
        unpickled(ByGetattr(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))
        is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    )


@pytest.mark.parametrize(
    ("owner", "name"), [(int, "to_bytes"), (io.BytesIO, "read"), (_MEM_FORMAT_ENCODING, "__class__")]
)
def test_any_other_attribute_is_refused(owner: type, name: str) -> None:
    with pytest.raises((DisallowedGlobalError, KeyError)):
        unpickled(ByGetattr(owner, name))
