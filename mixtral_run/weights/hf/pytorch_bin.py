"""Find the tensors in pytorch_model.bin, the pickled format before safetensors, without running its pickle.

torch's own restricted unpickler builds tensors without storage, and says where each of their storages is in the file.
Such a file stores the elements as they are, so that it is read like a safetensors file: as ranges of bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_run.weights.hf.safetensors_files import Headers, TensorEntry
from mixtral_run.weights.torch_dist.restricted_pickle import (
    ByteOrderError,
    DisallowedGlobalError,
    load_without_elements,
)

BIN_NAME = "pytorch_model.bin"
BIN_INDEX_NAME = "pytorch_model.bin.index.json"

_WORDS = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "uint8": "U8",
    "int16": "I16", "int32": "I32", "int64": "I64", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip
"""torch's name of a dtype → safetensors' name."""


def has_bins(directory: Path) -> bool:
    """Return True if the weights of a model are there in the pickled format."""
    return (directory / BIN_INDEX_NAME).exists() or any(directory.glob("pytorch_model*.bin"))


def read_bins(directory: Path) -> Headers:
    """Return the tensors of pytorch_model.bin, or of all the files that its index names."""
    index = directory / BIN_INDEX_NAME
    names = [BIN_NAME]
    if index.is_file():
        try:
            names = sorted({str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return Headers({}, problems=(f"{BIN_INDEX_NAME}: not an index ({type(error).__name__}: {error})",))
    elif not (directory / BIN_NAME).exists():
        found = ", ".join(sorted(file.name for file in directory.glob("pytorch_model*.bin"))[:3])
        return Headers({}, problems=(f"neither {BIN_INDEX_NAME} nor {BIN_NAME} is there; found {found}",))
    return read_bin_files(directory, names)


def read_bin_files(directory: Path, names: list[str]) -> Headers:
    """Return the tensors of files that torch.save wrote, with the problems of those that cannot be used."""
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    for name in names:
        try:
            entries |= _entries(directory / name)
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            problems.append(f"{name}: cannot be read ({error.strerror})")
        except DisallowedGlobalError as error:
            problems.append(f"{name}: refused, because its pickle would run {error.name}")
        except (ByteOrderError, _NotWeightsError) as error:
            problems.append(f"{name}: {error}")
        except Exception as error:  # a damaged zip or pickle raises anything
            problems.append(f"{name}: damaged, or not what torch.save writes ({type(error).__name__})")
    files = tuple(directory / name for name in names)
    note = f"the weights are read from {names[0]}, torch's older format"
    return Headers(entries, files, tuple(problems), notes=(note,))


class _NotWeightsError(Exception):
    """The file is what torch.save writes, but not the weights of a model in the form that can be read in place."""


def _entries(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    entries = {}
    for name, tensor in _tensors(file).items():
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if offset is None:
            raise _NotWeightsError("written by torch before version 1.6: load it with torch and save it again")
        if not tensor.is_contiguous():
            raise _NotWeightsError(f"tensor {name} is stored transposed or in steps")
        item_size = tensor.element_size()
        start, num_bytes = offset + tensor.storage_offset() * item_size, tensor.numel() * item_size
        if start < 0 or start + num_bytes > size:
            raise _NotWeightsError(f"truncated: tensor {name} ends at byte {start + num_bytes:,}; found {size:,} bytes")
        dtype = str(tensor.dtype).removeprefix("torch.")
        word = _WORDS.get(dtype)
        if word is None:
            raise _NotWeightsError(f"tensor {name} has the dtype {dtype}")
        entries[name] = TensorEntry(name, word, tuple(tensor.shape), file, start, num_bytes)
    return entries


def _tensors(file: Path) -> dict[str, Any]:
    """Return the file's tensors by name, without elements."""
    import torch

    found = load_without_elements(file)
    if not isinstance(found, Mapping):
        raise _NotWeightsError(f"holds a {type(found).__name__}, not tensors by name")
    inner = [name for name in ("state_dict", "model", "module") if isinstance(found.get(name), Mapping)]
    if inner:
        raise _NotWeightsError(
            f"a training checkpoint, with the weights under {inner[0]!r}; the kit reads the weights alone"
        )
    tensors = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not name.isprintable() or not isinstance(tensor, torch.Tensor):
            raise _NotWeightsError("holds other things than tensors by name")
        tensors[name] = tensor
    return tensors
