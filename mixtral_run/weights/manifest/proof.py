"""Check a checkpoint by its `proof.json`, which has the checksum of everything that its conversion read and wrote.

CRC-32 finds every flipped bit and every damaged block; it is no protection against a person who means to deceive.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from isal.isal_zlib import crc32

from mixtral_run.errors import WeightsError
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.metadata import StoredItem

PROOF_NAME = "proof.json"
_BLOCK_BYTES = 2**20


def check_files(folder: Path) -> list[str]:
    """Return a line for each file next to the weights that differs from what was written.

    Raises WeightsError without a proof. Nothing else of the checkpoint is read, so that files can be named whose damage
    would break the other checks.
    """
    problems = []
    # Proofs of earlier versions of the kit name no files.
    for name, written in _read_proof(folder).get("files", {}).items():
        if not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif (found := f"{crc_of(folder / name):08x}") != written:
            problems.append(f"{name}: expected CRC-32 {written}; found {found}")
    return problems


def _read_proof(folder: Path) -> dict[str, Any]:
    path = folder / PROOF_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or not isinstance(content.get("files", {}), dict):
            raise ValueError("not a proof")
        for name in content.get("files", {}):
            # A part of this folder: the proof may come from anybody.
            if (
                PurePosixPath(name).is_absolute()
                or ".." in PurePosixPath(name).parts
                or not name.isprintable()
                or len(name) > 200
            ):
                raise ValueError(f"{name[:40]!a} is not a file of this folder")
        return content
    # RecursionError: the JSON is nested thousands deep.
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> WeightsError:
    return WeightsError(
        "The checkpoint's proof cannot be read.",
        where=str(path),
        found=error.strerror if isinstance(error, OSError) else str(error),
        next_command="mixtral-run verify --against HF_DIR, which needs none",
    )


def check_proof(folder: Path, reader: Reader, advance: Callable[[int], None]) -> list[str]:
    """Read every chunk once; return a line for each that differs from what was written, with its tensors and file.

    Raises WeightsError if no proof can be read.
    """
    try:
        chunks = _read_proof(folder)["chunks"]
        wanted = {(each["key"], tuple(each["offset"])): (int(each["crc32"], 16), each["tensors"]) for each in chunks}
        for _, names in wanted.values():
            if not isinstance(names, list) or not all(isinstance(each, str) and each.isprintable() for each in names):
                raise ValueError("the names of a chunk's tensors are not a list of texts")
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder / PROOF_NAME, error) from error
    items = [item for key in reader.tensors for item in reader.chunks(key)]
    held = {(item.key, item.offset) for item in items}
    problems = [f"{key} at {list(offset)}: missing" for key, offset in wanted if (key, offset) not in held]

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
        problems += [problem for problem in pool.map(check, items) if problem is not None]
    return problems
