"""Open an HF model: config.json, and the place of every tensor of the released layout, all of one dtype.

All problems are reported at once, each with what helps against it. Standard library only, unless the weights are in the
pickled format or in several dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.model.architecture import MixtralArchitecture, read_config
from mixtral_run.model.hf_config import config_notes, set_in_config
from mixtral_run.weights.hf import recast
from mixtral_run.weights.hf.foreign_tensors import foreign_form, unwrapped
from mixtral_run.weights.hf.pytorch_bin import has_bins, read_bins
from mixtral_run.weights.hf.safetensors_files import (
    DTYPES,
    INDEX_NAME,
    ITEM_SIZES,
    SINGLE_NAME,
    Headers,
    Source,
    TensorEntry,
    read_headers,
)
from mixtral_run.weights.mapping import hf_to_megatron

DOWNLOAD_AGAIN = "download the named files again; a finished download is checked by `hf cache verify`"
SAVE_AGAIN = "save the model again with transformers' save_pretrained, or ask whoever made it; its files are whole"
BINS = (
    "use the model's safetensors files, where its maker has them; download only files again that are missing or cut off"
)
"""Advice for files that are not what their headers say, for files that are whole but not a Mixtral's, and for pickled
files."""

_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class HFWeights:
    """A checked HF model with every tensor of the released layout, all of one dtype.

    notes: lines for the user about what is not used, or used in another form. as_stored: False if the sources are not
    simply the tensors of `files`, because some were cast or the files are not safetensors. renamed: the tensors have
    other names in the files, under which transformers does not find them.
    """

    directory: Path
    architecture: MixtralArchitecture
    dtype: str
    item_size: int
    sources: Mapping[str, Source]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    recast: tuple[str, ...] = ()
    as_stored: bool = True
    renamed: bool = False

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
    config = read_config(directory)
    architecture = MixtralArchitecture.from_hf_config(config, where=str(directory / "config.json"))
    is_bin = not (directory / INDEX_NAME).is_file() and not (directory / SINGLE_NAME).is_file() and has_bins(directory)
    headers = read_bins(directory) if is_bin else read_headers(directory)
    problems, notes = list(headers.problems), [*config_notes(config), *headers.notes]
    if not headers.entries:
        raise _unusable(directory, problems or ["the files hold no tensors"], BINS if is_bin else DOWNLOAD_AGAIN)
    foreign = foreign_form(headers.entries)
    if foreign is not None:
        raise _unusable(directory, [*problems, foreign.what], foreign.next_command)
    entries, lines = unwrapped(headers.entries)
    renamed = bool(lines)
    matching = _Matching(architecture, entries, headers)
    dtype, cast = matching.settle_dtype(config)
    if problems or matching.problems:
        whole = matching.advice(directory)
        advice = whole if not problems else BINS if is_bin else DOWNLOAD_AGAIN
        raise _unusable(directory, [*problems, *matching.problems], advice)
    name, item_size = DTYPES[dtype]
    notes += lines
    if cast:
        notes.append(_cast_note(cast, name))
    return HFWeights(
        directory,
        architecture,
        name,
        item_size,
        matching.sources(dtype),
        headers.files,
        tuple(notes),
        tuple(cast),
        as_stored=not (is_bin or cast or renamed),
        renamed=renamed,
    )


def _unusable(directory: Path, problems: list[str], next_command: str) -> WeightsError:
    return WeightsError(
        "The HF weights cannot be used.",
        where=str(directory),
        problems=shortened(problems),
        next_command=next_command,
    )


def _cast_note(cast: Mapping[str, TensorEntry], dtype: str) -> str:
    kinds = sorted({DTYPES[entry.dtype][0] for entry in cast.values()})
    some = ", ".join(list(cast)[:3]) + (", …" if len(cast) > 3 else "")
    return f"{len(cast):,} tensors are stored in {', '.join(kinds)} and cast to {dtype}: {some}"


class _Matching:
    """The tensors of the released layout, and the stored tensors that hold them. problems: a line each."""

    def __init__(self, architecture: MixtralArchitecture, entries: Mapping[str, TensorEntry], headers: Headers) -> None:
        self._architecture = architecture
        self._fused = hf_to_megatron.fused_tensors(architecture)
        self.problems: list[str] = []
        self._next: str | None = None
        self._places: dict[str, tuple[str, int]] = {}  # name → stored name, first element
        self._used: dict[str, TensorEntry] = {}
        self._match(entries, headers.unread)
        self.problems += [
            f"{entry.file.name}: tensor {name} is not part of a Mixtral model"
            for name, entry in entries.items()
            # Positions that older conversions stored; they follow from config.json.
            if name not in self._used and not name.endswith(".rotary_emb.inv_freq")
        ]

    def _match(self, entries: Mapping[str, TensorEntry], unread: frozenset[str]) -> None:
        wrong = _wrong_vocabulary(self._architecture, entries)
        if wrong is not None:
            self.problems.append(wrong)
        for name, shape in hf_to_megatron.hf_tensors(self._architecture).items():
            stored, first = name, 0
            place = hf_to_megatron.fused_place(self._architecture, name)
            if name not in entries and place is not None and place[0] in entries:
                stored, first = place
            entry = entries.get(stored)
            if entry is None:
                if name not in unread and (place is None or place[0] not in unread):
                    self.problems.append(f"tensor {name} is missing")
                continue
            expected = shape if stored == name else self._fused[stored]
            if entry.shape != expected and stored not in self._used and not (wrong and name in _VOCABULARY):
                self.problems.append(
                    f"{entry.file.name}: {stored}: expected shape {list(expected)}; found {list(entry.shape)}"
                )
            self._used[stored] = entry
            self._places[name] = (stored, first)
        if wrong is not None:
            rows = {entries[name].shape[0] for name in _VOCABULARY}
            # Only if nothing else is wrong does config.json alone need a change.
            self._rows = rows.pop() if len(rows) == 1 and len(self.problems) == 1 else None
        else:
            self._rows = None

    def advice(self, directory: Path) -> str:
        """Return what helps against the problems."""
        if self._rows is not None:
            return set_in_config(directory, "vocab_size", self._rows)
        return self._next or SAVE_AGAIN

    def settle_dtype(self, config: Mapping[str, Any]) -> tuple[str, dict[str, TensorEntry]]:
        """Return the model's dtype by safetensors' name, and the stored tensors that are cast to it, by their names.

        Weights of one dtype keep it. Of several dtypes the model's is the one that config.json names, as for
        transformers, or else that of most of the bytes.
        """
        kinds: dict[str, int] = {}
        for entry in self._used.values():
            kinds[entry.dtype] = kinds.get(entry.dtype, 0) + entry.num_bytes
        if not kinds:
            return "BF16", {}
        foreign = [kind for kind in kinds if kind not in DTYPES]
        if foreign:
            example = next(name for name, entry in self._used.items() if entry.dtype == foreign[0])
            self.problems.append(f"dtype: expected one of {', '.join(DTYPES)}; found {foreign[0]} (tensor {example})")
            return foreign[0], {}
        dtype = _named_dtype(config) if len(kinds) > 1 else next(iter(kinds))
        if dtype is None:
            dtype = max(kinds, key=lambda kind: kinds[kind])
        cast = {name: entry for name, entry in self._used.items() if entry.dtype != dtype}
        if cast and not self.problems:
            self._cast(cast, kinds, dtype)
        return dtype, cast

    def _cast(self, cast: Mapping[str, TensorEntry], kinds: Mapping[str, int], dtype: str) -> None:
        name = DTYPES[dtype][0]
        self._next = (
            "save it in one dtype with transformers: "
            f"AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.{name}).save_pretrained(OTHER_DIR)"
        )
        size = recast.bytes_to_cast(cast.values(), dtype)
        if size > recast.MOST_BYTES:
            texts = ", ".join(f"{count:,} bytes of {kind}" for kind, count in kinds.items())
            self.problems.append(
                f"dtype: expected one, or at most {recast.MOST_BYTES:,} bytes to cast to {name}; found {texts}"
            )
            return
        try:
            self._used = recast.recast(self._used, dtype)
        except recast.NotFiniteError as error:
            self.problems.append(f"dtype: {error}")

    def sources(self, dtype: str) -> dict[str, Source]:
        """Return the place of every tensor's bytes."""
        size, shapes = ITEM_SIZES[dtype], hf_to_megatron.hf_tensors(self._architecture)
        return {
            name: Source(self._used[stored].file, self._used[stored].start + first * size, prod(shapes[name]) * size)
            for name, (stored, first) in self._places.items()
        }


def _wrong_vocabulary(architecture: MixtralArchitecture, entries: Mapping[str, TensorEntry]) -> str | None:
    """Return the problem of embeddings with other rows than config.json's vocab_size."""
    found = {name: entries[name].shape for name in _VOCABULARY if name in entries}
    if len(found) < len(_VOCABULARY) or any(
        len(shape) != 2 or shape[1] != architecture.hidden_size for shape in found.values()
    ):
        return None
    rows = [shape[0] for shape in found.values()]
    if rows == [architecture.vocab_size] * len(rows):
        return None
    texts = " and ".join(f"{name} {count:,} rows" for name, count in zip(found, rows, strict=True))
    why = "padded or resized without config.json" if rows[0] == rows[1] else "only one of them was resized"
    return f"vocab_size: config.json says {architecture.vocab_size:,}; {texts} ({why})"


def _named_dtype(config: Mapping[str, Any]) -> str | None:
    """Return safetensors' name of the dtype that config.json names, None if it names none that a model may have."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    return next((word for word, (name, _) in DTYPES.items() if name == named), None)
