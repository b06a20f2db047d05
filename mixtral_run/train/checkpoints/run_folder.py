"""The folder that a training run writes to: one run at a time, the checkpoints that stay, the lines of its metrics."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from mixtral_run.config.verbs.training import RunConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.launch import processes
from mixtral_run.results.run_files import GROWING, METRICS, ROUTER
from mixtral_run.run_lock import one_run
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.atomic_folder import GIB, allocated_bytes, free_bytes
from mixtral_run.weights.io.files import write_atomically
from mixtral_run.weights.manifest.checkpoint_folder import iteration_of, kept_iterations, newest_iteration
from mixtral_run.weights.manifest.manifest import IterationManifest, read_checkpoint_manifest
from mixtral_run.weights.manifest.run_state import FilePrefix
from mixtral_run.weights.store.local import is_output_copy

if TYPE_CHECKING:  # The command that starts a job checks folders, and needs no Megatron.
    from mixtral_run.model.parallel.mesh import Mesh

PARTIAL = ".iter_*.partial"
"""Folders of checkpoints that are not complete yet, or not any more."""


@contextmanager
def own_output(lock: Path | None, verb: str) -> Iterator[None]:
    """Hold the lock of a run's output while the block runs, in the first rank. Do nothing without a lock.

    Raises ConfigError in the first rank if another run holds it.
    """
    if lock is None or processes.rank() != 0:
        yield
        return
    with one_run(lock, f"mixtral-run {verb}", lock.parent):
        yield


def check_shared(folder: Path, mesh: Mesh) -> None:
    """Raise ConfigError on all ranks if the hosts of a job see different folders. All ranks must call.

    Without it the first checkpoint would fail, perhaps hours later. The first process of each host writes a file, and
    the first rank looks for all of them: an NFS client that never saw a name asks the server.
    """
    if int(os.environ.get("LOCAL_WORLD_SIZE", mesh.world_size)) >= mesh.world_size:
        return
    token: list[Any] = [secrets.token_hex(8)]
    dist.broadcast_object_list(token)
    probe = folder / f".mixtral-run-probe-{token[0]}-{mesh.rank}"
    own = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        own = (socket.gethostname(), probe.name, _written(probe))
    found: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(found, own)
    answer: list[Any] = [None]
    if mesh.is_first:
        hosts = [each for each in found if each is not None]
        answer = [
            [
                f"{host}: {problem or 'writes to another folder of that name'}"
                for host, name, problem in hosts
                if problem or not (folder / name).is_file()
            ]
        ]
    dist.broadcast_object_list(answer)
    with contextlib.suppress(OSError):
        probe.unlink(missing_ok=True)
    if answer[0]:
        if own is not None and not mesh.is_first:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ConfigError(
            "The hosts of the job do not share the folder of its checkpoints. Each host writes a part of each one.",
            where=str(folder),
            expected="a folder on a file system that all hosts have at this path",
            problems=answer[0],
            next_command="--save on a shared file system; of --save s3://… the folder is MIXTRAL_RUN_STORE_CACHE",
        )


def _written(probe: Path) -> str | None:
    """Write a file that other hosts look for. Return why it cannot be written, or None."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return None


def num_checkpoints(config: RunConfig, start: int) -> int:
    """Return the largest number of checkpoints that the run writes and that are on the disk at once.

    start: the iteration after which the run continues. A new checkpoint is complete before an old one is removed.
    """
    most = _most_at_once(config)
    return _num_written(config, start) if most is None else min(_num_written(config, start), most)


def additional_bytes(config: RunConfig, start: int, checkpoint_bytes: int) -> int:
    """Return the free bytes that the run needs on its disk. start: as in `num_checkpoints`.

    Checkpoints that are there count among those that --keep-last keeps, and give way to new ones. What an interrupted
    save left is removed before the first new one.

    checkpoint_bytes: of one checkpoint.
    """
    written, most = _num_written(config, start), _most_at_once(config)
    num_there = bytes_left = 0
    # A folder that cannot be looked into is reported by those who check whether it can be written.
    with contextlib.suppress(OSError):
        num_there = 0 if most is None else len(_checkpoints_up_to(config.folder, start))
        bytes_left = sum(map(allocated_bytes, config.folder.glob(PARTIAL)))
    if most is not None:
        # A new one is complete before the first is removed, however many are there.
        written = max(1, min(written, most - num_there))
    return max(0, written * checkpoint_bytes - bytes_left)


def _num_written(config: RunConfig, start: int) -> int:
    return config.iterations // config.save_interval - start // config.save_interval + 1


def _most_at_once(config: RunConfig) -> int | None:
    """Return the most checkpoints on the disk at once; None without --keep-last.

    Those that stay and the one that is being written. One that is being copied to a store stays until it is there.
    """
    if config.keep_last is None:
        return None
    return config.keep_last + config.keep_best + 1 + is_output_copy(config.folder)


def saves_before_the_end(config: RunConfig, start: int) -> bool:
    """Return True if the run may save a checkpoint and train on. start: the iteration after which it continues."""
    next_one = (start // config.save_interval + 1) * config.save_interval
    return next_one < config.iterations or config.early_stopping_patience > 0


def report_disk_use(config: RunConfig, num_bytes: int, report: Report) -> None:
    """Report what the checkpoints of the run take. num_bytes: of all that are on the disk at once."""
    kept = "none is removed" if config.keep_last is None else f"kept: the newest {config.keep_last}"
    best = ", and the best" if config.keep_best else ""
    if config.keep_last is not None and is_output_copy(config.folder):
        best += "; one more while it is copied to the store"
    report.say(
        f"Checkpoints take up to {num_bytes / GIB:,.2f} GiB in {config.folder} ({kept}{best}); "
        f"{free_bytes(config.folder.absolute()) / GIB:,.2f} GiB are free"
    )


def remove_old_checkpoints(save: Path, keep_last: int | None, keep_best: bool) -> list[Path]:
    """Remove the checkpoints that are neither among the newest nor the best; return them.

    One process calls, after a save.
    """
    if keep_last is None:
        return []
    newest = iteration_of(newest_iteration(save))
    found = _checkpoints_up_to(save, newest)
    losses = {iteration: manifest.state.validation_loss for iteration, (_, manifest) in found.items()}
    kept = kept_iterations(losses, keep_last, keep_best=keep_best)
    removed = []
    for iteration in sorted(set(found) - kept):
        # Renamed first: a folder of which a part is gone must not have the name of a checkpoint.
        folder, _ = found[iteration]
        leaving = save / f".{folder.name}.partial"
        shutil.rmtree(leaving, ignore_errors=True)
        folder.rename(leaving)
        shutil.rmtree(leaving, ignore_errors=True)
        removed.append(folder)
    return removed


def _checkpoints_up_to(save: Path, newest: int) -> dict[int, tuple[Path, IterationManifest]]:
    """Return the checkpoints of a run up to an iteration, each with its manifest.

    What is not a checkpoint of this kit, or a damaged one, is left out: it is left to the user.
    """
    found: dict[int, tuple[Path, IterationManifest]] = {}
    for folder in save.glob("iter_*"):
        if iteration_of(folder) <= newest:
            with contextlib.suppress(WeightsError):
                manifest = read_checkpoint_manifest(folder)
                if isinstance(manifest, IterationManifest):
                    found[iteration_of(folder)] = folder, manifest
    return found


def remove_partial_checkpoints(save: Path) -> None:
    """Remove what a killed run left of a save, or of the removal of an old checkpoint. One process calls.

    The run may never save this iteration again, if its --save-interval is another one now.
    """
    for folder in save.glob(PARTIAL):
        shutil.rmtree(folder, ignore_errors=True)


def growing_files(save: Path) -> dict[str, FilePrefix]:
    """Return size and checksum of the metrics and evaluations so far."""
    found = {}
    for name in GROWING:
        if (save / name).is_file():
            content = (save / name).read_bytes()
            found[name] = FilePrefix(len(content), f"{zlib.crc32(content):08x}")
    return found


def drop_later_lines(save: Path, iteration: int, written: Any, report: Report) -> None:
    """Remove the lines of iterations that a resumed run repeats. One process calls.

    written: size and checksum of each file when the checkpoint was saved. A file that has changed since is reported.
    """
    for name in GROWING:
        file = save / name
        content = file.read_bytes() if file.is_file() else b""
        prefix = written.get(name)
        if prefix is not None:
            head = content[: prefix.num_bytes]
            if len(head) != prefix.num_bytes or f"{zlib.crc32(head):08x}" != prefix.crc32:
                report.warn(f"{file} is not what was written up to iteration {iteration}: it is damaged or was edited")
        # The evaluation at the iteration itself is repeated.
        kept = _lines(
            content, (lambda at: at <= iteration) if name in (METRICS, ROUTER) else (lambda at: at < iteration)
        )
        if content and kept != content:
            write_atomically(file, kept.decode("utf-8", errors="replace"))


def _lines(content: bytes, wanted: Callable[[int], bool]) -> bytes:
    """Return the lines whose iteration is wanted; a line that is cut off or odd is dropped."""
    kept = []
    for line in content.splitlines(keepends=True):
        try:
            iteration = json.loads(line)["iteration"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if line.endswith(b"\n") and type(iteration) is int and wanted(iteration):
            kept.append(line)
    return b"".join(kept)
