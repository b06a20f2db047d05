"""`proof.json`: the checksum of everything a conversion read and wrote, and the pass that checks a checkpoint by it.

CRC-32 finds every flipped bit and every damaged block; it is no protection against a person who means to deceive.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from mixtral_run import __version__
from mixtral_run.errors import WeightsError
from mixtral_run.weights.convert.copy_plan import Plan
from mixtral_run.weights.convert.journal import JOURNAL_NAME, JobSums
from mixtral_run.weights.hf.safetensors_files import HFWeights
from mixtral_run.weights.manifest.describe import LATEST, write_whole
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.metadata import StoredItem

PROOF_NAME = "proof.json"
_BLOCK_BYTES = 2**20


def write_proof(folder: Path, weights: HFWeights, plan: Plan, sums: Mapping[int, JobSums]) -> None:
    """Write FOLDER/proof.json: the source's files and revision, CRC-32 of every HF tensor, of every chunk, and of the
    small files that are in the folder by now.
    """
    tensors = {name: crc for each in sums.values() for name, crc in each.sources.items()}
    chunks = [
        {
            "key": placed.chunk.key,
            "offset": list(placed.chunk.offset),
            "file": placed.file,
            "tensors": list(job.unit.sources),
            "crc32": f"{crc:08x}",
        }
        for number, job in enumerate(plan.jobs)
        for placed, crc in zip(job.chunks, sums[number].chunks, strict=True)
    ]
    content = {
        "format": 1,
        "kit_version": __version__,
        "source": {
            "revision": _revision(weights.directory),
            "dtype": weights.dtype,
            "files": {file.name: file.stat().st_size for file in weights.files},
        },
        "tensors": {name: f"{tensors[name]:08x}" for name in sorted(tensors)},
        "chunks": chunks,
        "files": {name: f"{crc_of(folder / name):08x}" for name in _small_files(folder)},
    }
    write_whole(folder / PROOF_NAME, json.dumps(content, indent=1) + "\n")


def _small_files(folder: Path) -> list[str]:
    """What lies beside the weights, by its path within the folder."""
    # A part of a file is what an earlier run left when it was cut off: its place is taken.
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".distcp", ".partial"))
    names = (path.relative_to(folder).as_posix() for path in files)
    # The journal goes; the marker is Megatron's to change when it saves a later iteration beside this one.
    return sorted(name for name in names if name not in (PROOF_NAME, JOURNAL_NAME, LATEST))


def crc_of(file: Path) -> int:
    """CRC-32 of a whole file."""
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            crc = crc32(block, crc)
    return crc


def check_files(folder: Path) -> list[str]:
    """A line for each file beside the weights that is not what was written. Raises WeightsError without a proof.

    Needs nothing of the checkpoint but its proof: asked first, it names what would keep the rest from being read.
    """
    faults = []
    # Proofs of earlier versions of the kit name no files.
    for name, written in _read_proof(folder).get("files", {}).items():
        if not (folder / name).is_file():
            faults.append(f"{name}: missing")
        elif (found := f"{crc_of(folder / name):08x}") != written:
            faults.append(f"{name}: expected CRC-32 {written}; found {found}")
    return faults


def _read_proof(folder: Path) -> dict[str, Any]:
    path = folder / PROOF_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("files", {}), dict):
            raise ValueError("not a proof")
        return content
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        "The checkpoint's proof cannot be read.",
        where=str(path),
        found=error.strerror if isinstance(error, OSError) else str(error),
        next_command="mixtral-run verify --against HF_DIR, which needs none",
    )


def _revision(directory: Path) -> str | None:
    """The hub's commit, where the directory is a snapshot of its cache."""
    resolved = directory.resolve()
    return resolved.name if resolved.parent.name == "snapshots" else None


def check_proof(folder: Path, reader: Reader, advance: Callable[[int], None]) -> list[str]:
    """Read every chunk once; lines that name the tensors and the file of each that is not what was written.

    Raises WeightsError when there is no proof that can be read.
    """
    try:
        chunks = _read_proof(folder)["chunks"]
        wanted = {(each["key"], tuple(each["offset"])): (int(each["crc32"], 16), each["tensors"]) for each in chunks}
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / PROOF_NAME, error) from error
    items = [item for key in reader.tensors for item in reader.chunks(key)]
    held = {(item.key, item.offset) for item in items}
    faults = [f"{key} at {list(offset)}: missing" for key, offset in wanted if (key, offset) not in held]

    def check(item: StoredItem) -> str | None:
        expected: tuple[int | None, list[Any]] = wanted.get((item.key, item.offset or ()), (None, []))
        crc = 0
        for block in reader.payload(item, _BLOCK_BYTES):
            crc = crc32(block, crc)
            advance(len(block))
        if crc == expected[0]:
            return None
        if expected[0] is None:
            return f"{item.key} at {list(item.offset or ())}: not in {PROOF_NAME} ({item.file})"
        names = ", ".join(expected[1])
        return f"{names}: expected CRC-32 {expected[0]:08x}; found {crc:08x} ({item.key} in {item.file})"

    with ThreadPoolExecutor(2, "proof") as pool:
        faults += [fault for fault in pool.map(check, items) if fault is not None]
    return faults
