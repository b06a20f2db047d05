"""Write `proof.json`: the checksum of everything that a conversion read and wrote. `manifest/proof.py` checks it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mixtral_run import __version__
from mixtral_run.run_lock import LOCK_NAME
from mixtral_run.weights.convert.copy_plan import Plan
from mixtral_run.weights.convert.journal import JOURNAL_NAME, JobSums
from mixtral_run.weights.hf.hf_weights import HFWeights
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.proof import PROOF_NAME


def write_proof(folder: Path, weights: HFWeights, plan: Plan, sums: Mapping[int, JobSums]) -> None:
    """Write FOLDER/proof.json: the source's files and revision, and CRC-32 of tensors, chunks and small files.

    The small files must be in the folder by now.
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
    write_atomically(folder / PROOF_NAME, json.dumps(content, indent=1) + "\n")


def _small_files(folder: Path) -> list[str]:
    """Return the paths of the files next to the weights, relative to the folder."""
    # `.partial` files were left by an interrupted run and replaced since.
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".distcp", ".partial"))
    names = (path.relative_to(folder).as_posix() for path in files)
    # Journal and lock are removed; Megatron changes the marker when it saves a later iteration next to this one.
    return sorted(name for name in names if name not in (PROOF_NAME, JOURNAL_NAME, LATEST, LOCK_NAME))


def _revision(directory: Path) -> str | None:
    """Return the hub's commit if the directory is a snapshot of its cache, else None."""
    resolved = directory.resolve()
    return resolved.name if resolved.parent.name == "snapshots" else None
