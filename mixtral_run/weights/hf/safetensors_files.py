"""Read the headers of safetensors files: the place of each tensor, with all problems of all files reported at once.

The kit has a reader of its own because a copy needs byte offsets, not tensors, and because problems of a download are
reported with the file's name and the missing bytes. Format: safetensors' README, section "Format". Standard library
only; no tensor data is read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any

from mixtral_run.errors import WeightsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

DTYPES = {"BF16": ("bfloat16", 2), "F16": ("float16", 2), "F32": ("float32", 4)}
"""Safetensors' name of a dtype → torch's and HF's name, bytes per element. The dtypes that a model may be stored in."""

ITEM_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
ITEM_SIZES |= {"I64": 8, "U64": 8, "F64": 8} | {word: size for word, (_, size) in DTYPES.items()}
"""Bytes per element, by safetensors' name of the dtype."""
_LARGEST_HEADER = 100_000_000  # the limit of the format's own reader


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a file. start: its first byte, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Source:
    """The file, first byte and length of one tensor of the released layout."""

    file: Path
    start: int
    num_bytes: int


@dataclass(frozen=True)
class Headers:
    """The headers of a model's files, and their problems."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()  # tensors that the index places in files that cannot be used
    notes: tuple[str, ...] = ()  # for the user, about files that can be used


def read_headers(directory: Path) -> Headers:
    """Read the index and the header of every file that it names."""
    index = directory / INDEX_NAME
    single = directory / SINGLE_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = {str(name): str(file) for name, file in weight_map.items()}
            for file in wanted.values():
                # The index may come from anybody, and so may the name of a file elsewhere.
                if not file.isprintable() or file in (".", "..") or PurePosixPath(file).name != file or len(file) > 200:
                    raise ValueError(f"{file[:60]!a} is not the name of a file of this folder")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            return Headers({}, problems=(f"{INDEX_NAME}: not a safetensors index ({type(error).__name__}: {error})",))
    elif single.is_file():
        wanted = {}
    else:
        return Headers({}, problems=(f"neither {INDEX_NAME} nor {SINGLE_NAME} is there",))
    names = sorted(set(wanted.values())) or [SINGLE_NAME]
    entries: dict[str, TensorEntry] = {}
    problems: list[str] = []
    unreadable = set()
    for name in names:
        try:
            found_entries = read_header(directory / name)
        except WeightsError as error:
            problems += error.problems
            unreadable.add(name)
            continue
        for entry in found_entries:
            if wanted.get(entry.name, name) == name:
                entries[entry.name] = entry
    problems += [
        f"{file}: tensor {tensor} is missing, which {INDEX_NAME} says is there"
        for tensor, file in wanted.items()
        if file not in unreadable and tensor not in entries
    ]
    unread = frozenset(tensor for tensor, file in wanted.items() if file in unreadable)
    return Headers(entries, tuple(directory / name for name in names), tuple(problems), unread)


def read_header(file: Path) -> list[TensorEntry]:
    """Return the tensors of one file in the order of their bytes. Raises WeightsError with all problems."""
    name, length = file.name, 0
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":
                raise _unusable(f"{name}: a Git LFS pointer of {size} bytes, not the weights (run `git lfs pull`)")
            if len(start) < 8 or length > min(_LARGEST_HEADER, size - 8):
                raise _unusable(f"{name}: corrupt header: it says {length:,} bytes long, the file has {size:,} bytes")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise _unusable(f"{name}: missing") from None
    except OSError as error:
        raise _unusable(f"{name}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _unusable(f"{name}: corrupt header: {length:,} bytes that are not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _unusable(f"{name}: corrupt header: a JSON {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    entries = []
    problems = []
    for tensor, value in header.items():
        try:
            entries.append(_entry(file, 8 + length, tensor, value))
        except ValueError as error:
            problems.append(f"{name}: tensor {tensor}: {error}")
    if not problems:
        entries.sort(key=lambda entry: (entry.start, entry.num_bytes))
        problems = _extent_problems(entries, 8 + length, size)
    if problems:
        raise _unusable(*problems)
    return entries


def header_of(tensors: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Return the header of a safetensors file with these tensors, in this order, all of one dtype."""
    word = next(word for word, (name, _) in DTYPES.items() if name == dtype)
    return mixed_header({name: (word, shape) for name, shape in tensors.items()})


def mixed_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the header for tensors with dtypes of their own: name → (safetensors' dtype, shape)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (word, shape) in tensors.items():
        size = prod(shape) * ITEM_SIZES[word]
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _unusable(*problems: str) -> WeightsError:
    return WeightsError("A safetensors file cannot be used.", problems=problems)


def _entry(file: Path, data_start: int, name: str, value: Any) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"expected dtype, shape and data_offsets; found {str(value)[:100]}") from None
    numbers = (*shape, begin, end)
    if any(not isinstance(number, int) or isinstance(number, bool) or number < 0 for number in numbers):
        raise ValueError(f"expected whole numbers in shape and data_offsets; found {str(value)[:100]}")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"unknown dtype {dtype!r}")
    num_bytes = prod(shape) * ITEM_SIZES[dtype]
    if end - begin != num_bytes:
        raise ValueError(f"{dtype} {list(shape)} takes {num_bytes:,} bytes; its offsets span {end - begin:,}")
    return TensorEntry(name, dtype, shape, file, data_start + begin, num_bytes)


def _extent_problems(entries: list[TensorEntry], data_start: int, size: int) -> list[str]:
    """Return overlaps, gaps, and an end of the data that is not the end of the file."""
    problems = []
    reached = data_start
    before = "the header"
    for entry in entries:
        if entry.start != reached:
            how = "overlaps" if entry.start < reached else "leaves a gap after"
            problems.append(
                f"{entry.file.name}: tensor {entry.name} {how} {before}: starts at byte {entry.start:,}, "
                f"expected {reached:,}"
            )
        reached = max(reached, entry.start + entry.num_bytes)
        before = entry.name
    if reached > size:
        problems.append(
            f"{entries[-1].file.name}: truncated: expected {reached:,} bytes; found {size:,} "
            f"({reached - size:,} bytes missing)"
        )
    elif entries and reached < size:
        problems.append(
            f"{entries[-1].file.name}: expected {reached:,} bytes; found {size:,} ({size - reached:,} too many)"
        )
    return problems
