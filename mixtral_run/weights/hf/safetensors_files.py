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
from pathlib import Path
from typing import Any

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.mapping import hf_to_megatron

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
class HFWeights:
    """A checked HF model with every tensor of the released layout, all of one dtype."""

    directory: Path
    architecture: MixtralArchitecture
    dtype: str
    item_size: int
    sources: Mapping[str, Source]
    files: tuple[Path, ...]

    @property
    def num_bytes(self) -> int:
        """Return the size of all tensors together."""
        return sum(source.num_bytes for source in self.sources.values())


def is_hf_directory(folder: Path) -> bool:
    """Return True if a folder looks like an HF model, however many problems it has."""
    return any((folder / name).exists() for name in ("config.json", INDEX_NAME, SINGLE_NAME))


def open_hf_weights(directory: Path) -> HFWeights:
    """Read config.json and all headers. Raises one WeightsError with all of their problems."""
    if not directory.is_dir():
        raise WeightsError(
            "The HF model directory does not exist.",
            where=str(directory),
            expected="a directory with config.json and safetensors files",
        )
    architecture = MixtralArchitecture.from_hf_directory(directory)
    headers = read_headers(directory)
    sources: dict[str, Source] = {}
    dtype, problems = "BF16", list(headers.problems)
    if headers.entries:
        sources, dtype, more = _match(architecture, headers.entries, headers.unread)
        problems += more
    if problems:
        raise WeightsError(
            "The HF weights cannot be used.",
            where=str(directory),
            problems=shortened(problems),
            next_command="download the named files again; a finished download is checked by `hf cache verify`",
        )
    name, item_size = DTYPES[dtype]
    return HFWeights(directory, architecture, name, item_size, sources, headers.files)


@dataclass(frozen=True)
class Headers:
    """The headers of a model's files, and their problems."""

    entries: Mapping[str, TensorEntry]
    files: tuple[Path, ...] = ()
    problems: tuple[str, ...] = ()
    unread: frozenset[str] = frozenset()  # tensors that the index places in files that cannot be used


def read_headers(directory: Path) -> Headers:
    """Read the index and the header of every file that it names."""
    index = directory / INDEX_NAME
    single = directory / SINGLE_NAME
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            wanted = {str(name): str(file) for name, file in weight_map.items()}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return Headers({}, problems=(f"{INDEX_NAME}: not a safetensors index ({type(error).__name__}: {error})",))
    elif single.is_file():
        wanted = {}
    else:
        found = sorted(path.name for path in directory.glob("*.bin"))
        also = f"; found {', '.join(found[:3])}, which is the old pickled format" if found else ""
        return Headers({}, problems=(f"neither {INDEX_NAME} nor {SINGLE_NAME} is there{also}",))
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
    name = file.name
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
    except ValueError as error:
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
    if dtype not in ITEM_SIZES:
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


def _match(
    architecture: MixtralArchitecture, entries: Mapping[str, TensorEntry], unread: frozenset[str]
) -> tuple[dict[str, Source], str, list[str]]:
    """Find the bytes of every tensor of the released layout; report missing, misshapen and unknown tensors and dtypes.

    unread: tensors of files whose problems are reported already.
    """
    problems: list[str] = []
    sources: dict[str, Source] = {}
    used: dict[str, TensorEntry] = {}
    fused = hf_to_megatron.fused_tensors(architecture)
    for name, shape in hf_to_megatron.hf_tensors(architecture).items():
        stored, first = name, 0
        place = hf_to_megatron.fused_place(architecture, name)
        if name not in entries and place is not None and place[0] in entries:
            stored, first = place
        entry = entries.get(stored)
        if entry is None:
            if name not in unread and (place is None or place[0] not in unread):
                problems.append(f"tensor {name} is missing")
            continue
        expected = shape if stored == name else fused[stored]
        if entry.shape != expected and stored not in used:
            problems.append(f"{entry.file.name}: {stored}: expected shape {list(expected)}; found {list(entry.shape)}")
        used[stored] = entry
        item_size = ITEM_SIZES[entry.dtype]
        sources[name] = Source(entry.file, entry.start + first * item_size, prod(shape) * item_size)
    problems += [
        f"{entry.file.name}: tensor {name} is not part of a Mixtral model"
        for name, entry in entries.items()
        # Positions that older conversions stored; they follow from config.json.
        if name not in used and not name.endswith(".rotary_emb.inv_freq")
    ]
    dtype, dtype_problems = _one_dtype(used)
    return sources, dtype, problems + dtype_problems


def _one_dtype(used: Mapping[str, TensorEntry]) -> tuple[str, list[str]]:
    kinds: dict[str, list[TensorEntry]] = {}
    for entry in used.values():
        kinds.setdefault(entry.dtype, []).append(entry)
    if not kinds:
        return "BF16", []
    dtype = max(kinds, key=lambda kind: len(kinds[kind]))
    if dtype not in DTYPES:
        return dtype, [f"dtype: expected one of {', '.join(DTYPES)}; found {dtype}"]
    if len(kinds) == 1:
        return dtype, []
    counts = ", ".join(f"{kind} {len(entries)} tensors (such as {entries[0].name})" for kind, entries in kinds.items())
    return dtype, [f"dtype: expected one for all tensors; found {counts}"]
