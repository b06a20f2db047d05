"""Saving a checkpoint: at once, or in the background while the training continues.

docs/formats.md describes the files. A checkpoint is written under a temporary name and renamed when it is complete; the
marker of the newest one follows. In the background the same steps run in a thread of each rank, on a copy in host
memory and with a process group of their own, so that they never meet the collectives of the training.
"""

from __future__ import annotations

import logging
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
import torch.distributed as dist

from mixtral_run.launch.heartbeat import unnoted
from mixtral_run.launch.worker_errors import is_consequence
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.run_lock import check_held
from mixtral_run.train.checkpoints.adapter_shards import ParameterState, adapter_shards, live_states
from mixtral_run.train.checkpoints.adapter_writer import AdapterWriter
from mixtral_run.train.checkpoints.background import WAIT_SECONDS, BackgroundTask
from mixtral_run.train.checkpoints.host_copy import AdapterCopy, HostCopy, fits_on_hosts
from mixtral_run.train.checkpoints.random_state import own_random_state, write_random_state
from mixtral_run.train.checkpoints.save_target import SaveTarget
from mixtral_run.train.checkpoints.soundness import check_sound
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer
from mixtral_run.weights.io.daemon_threads import Beside
from mixtral_run.weights.io.files import sync_folder_and_files, write_atomically
from mixtral_run.weights.manifest.adapter_files import NEXT_MARKER, TOKENIZER, checksums
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.manifest import write_manifest
from mixtral_run.weights.manifest.run_state import RunState
from mixtral_run.weights.torch_dist.megatron_files import write_metadata_json

log = logging.getLogger(__name__)

SLOWEST_BYTES_A_SECOND = 100e6
"""A disk that takes the files of a job more slowly than this counts as one that does not answer."""
PLAN_SECONDS = 10.0
"""Longest time that a save waits for a plan that was begun ahead. It takes about a second to make a new one."""

_UNUSABLE, _RUNNING, _READY = 0.0, 1.0, 2.0


@dataclass(frozen=True)
class SaveRequest:
    """What a checkpoint says next to its tensors.

    Attributes:
        iteration: the number of finished iterations.
        description: goes into the iteration's mixtral_run.json, next to the architecture.
        state: goes there as well; --resume continues with it.
        tokenizer: folder whose files are copied next to the iterations if they are not there.
        then: called in the first process when the checkpoint is complete.
    """

    iteration: int
    description: Mapping[str, Any]
    state: RunState = field(default_factory=RunState)
    tokenizer: Path | None = None
    then: Callable[[], object] = lambda: None


class FileWriter(Protocol):
    """The plan of the files of a checkpoint (adapter_writer.py, full/chunk_writer.py)."""

    def write(self, folder: Path) -> tuple[list[Any], dict[str, str]]:
        """Write this rank's file. Return what `finish` needs of it, and its checksum by its name. Rank-local."""

    def finish(self, folder: Path, written: list[list[Any]]) -> None:
        """Write `.metadata`. One process calls. written: of each rank."""


class Saver(ABC):
    """Saves the checkpoints of a run: at once, or in the background. All ranks must call its methods.

    A context: at its end a save in the background is completed as far as this process can, so that an error of the
    training costs no checkpoint.

    Attributes:
        WHAT: what is saved, for messages.
        KIND: of the manifest.
        copy_problem: why the copy of a save in the background could not be allocated, if it was tried.
    """

    WHAT: ClassVar[str]
    KIND: ClassVar[str]

    def __init__(self, model: MixtralModel, folder: Path, timeout_minutes: float = 10) -> None:
        """timeout_minutes: time that a process may wait for others; a save in the background may take it as well, and
        more for each byte.
        """
        self._model, self._folder, self._timeout = model, folder, timeout_minutes
        self._copy: HostCopy | None = None
        self.copy_problem: str | None = None
        self._writer: FileWriter | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: BackgroundTask | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Without one of the ranks no save can be completed, and the job is to end at once.
        if self._pending is not None and self.waits_after(error):
            # A rank that fails on its own takes its peers down only when it ends: until then they write their parts.
            # Errors of collectives mean that a peer may be gone already, and an interrupt that the user waits.
            all_live = not isinstance(error, dist.DistError) and (error is None or isinstance(error, Exception))
            self._pending.join_after_error(all_ranks_live=all_live)

    def waits_after(self, error: BaseException | None) -> bool:
        """Return True if the end of this context waits for a save in the background. error: of the training."""
        is_running = self._pending is not None and self._pending.is_running
        return is_running and not (error is not None and is_consequence(error))

    @abstractmethod
    def _new_copy(self) -> HostCopy:
        """Return the copy that a save in the background is written from; it has no memory yet."""

    @abstractmethod
    def _live_states(self) -> list[ParameterState]:
        """Return the state that this rank writes, in the tensors that training changes."""

    @abstractmethod
    def _writer_of(self, states: list[ParameterState], copy: HostCopy | None) -> FileWriter:
        """Return the plan of the files. states: what they hold; copy: that has them, if they are copied."""

    def _described(self, target: SaveTarget, request: SaveRequest) -> SaveRequest:
        """Return the request with what only the written files tell. All ranks must call."""
        del target
        return request

    @property
    def can_save_in_background(self) -> bool:
        """Return True after `prepare_background`, if the hosts have the memory."""
        return self._copy is not None

    def prepare_background(self) -> int:
        """Allocate the copy in host memory and plan the files, if each host has enough memory.

        If one rank cannot allocate its copy, none has one. Returns the bytes of all ranks' copies.
        """
        copy = self._new_copy()
        total = torch.tensor(float(copy.num_bytes), dtype=torch.float64)
        dist.all_reduce(total)
        if not fits_on_hosts(copy.num_bytes):
            return int(total)
        self.copy_problem = _allocate_everywhere(copy)
        if self.copy_problem is None:
            copy.attach()
            self._copy, self._writer = copy, self._writer_of(copy.states, copy)
            self._timeout += float(total) / SLOWEST_BYTES_A_SECOND / 60
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=self._timeout))
        return int(total)

    def plan_ahead(self) -> None:  # noqa: B027 - a plan that takes no time is made when it is needed
        """Begin to plan the files of a save at once, in a thread beside the training. All ranks must call.

        Call it once, after the optimizer's first step.
        """

    def save(self, request: SaveRequest) -> Path:
        """Write FOLDER/iter_…, then point LATEST at it. Return the folder.

        Raises TrainingError if it is spoiled, or cannot be written; earlier iterations are unchanged.
        """
        self.finish()
        if self._model.mesh.device.type == "cuda":
            # States in host memory may still be on their way from the GPU.
            torch.cuda.synchronize(self._model.mesh.device)
        states = self._live_states()
        target = SaveTarget(self._model.mesh, self._folder, request.iteration, what=self.WHAT)
        check_sound(states, self._folder, request.iteration, what=self.WHAT)
        self._write(target, self._writer_of(states, None), request, own_random_state(self._model.mesh))
        return target.final

    def save_in_background(self, request: SaveRequest) -> None:
        """Begin what `save` does, after `prepare_background`.

        The state is that of this step, although it is copied while the next one computes its gradients (host_copy.py).
        An earlier save is waited for. `poll` or `finish` raise the error of this one.
        """
        self.finish()
        copy, writer = self._copy, self._writer
        assert copy is not None and writer is not None
        random_state = own_random_state(self._model.mesh)
        target = SaveTarget(self._model.mesh, self._folder, request.iteration, self._group, self.WHAT)

        def task() -> None:
            copy.finish()
            check_sound(copy.states, self._folder, request.iteration, self._group, self.WHAT)
            self._write(target, writer, request, random_state)

        copy.begin()
        self._pending = BackgroundTask(task, self._model.mesh, target.final, self._timeout)

    def poll(self) -> float | None:
        """Return the seconds that a save in the background took if all ranks have completed it, else None.

        Costs one small reduction while there is one. Raises its error.
        """
        if self._pending is None or not self._pending.is_over():
            return None
        return self._take()

    def finish(self) -> float | None:
        """Wait for a save in the background, and return or raise as `poll` does. None without one."""
        if self._pending is None:
            return None
        self._pending.wait()
        return self._take()

    def _take(self) -> float:
        assert self._pending is not None
        task, self._pending = self._pending, None
        return task.result()

    def _write(
        self, target: SaveTarget, writer: FileWriter, request: SaveRequest, random_state: Mapping[str, Any]
    ) -> None:
        """Write all files of a checkpoint, give it its name, and let the marker name it. All ranks must call."""

        def own_part() -> tuple[list[Any], dict[str, str], Mapping[str, Any]]:
            return *writer.write(target.partial), random_state

        target.on_first_rank(lambda: begin(target, request.tokenizer))
        parts = target.gather(target.on_all_ranks(own_part))
        target.on_first_rank(lambda: writer.finish(target.partial, [each[0] for each in parts]))
        described = self._described(target, request)

        def rest() -> None:
            write_random_state(target.partial, target.mesh, [each[2] for each in parts])
            sums = {name: crc for each in parts for name, crc in each[1].items()}
            complete(target, described, self._model.architecture.to_mapping(), sums, self.KIND)

        target.on_first_rank(rest)
        if target.mesh.is_first:
            request.then()


class AdapterSaver(Saver):
    """Saves the adapters of a model with the state of AdamW."""

    WHAT, KIND = "adapter", "adapter"

    def __init__(
        self, model: MixtralModel, optimizer: torch.optim.Optimizer, folder: Path, timeout_minutes: float = 10
    ) -> None:
        super().__init__(model, folder, timeout_minutes)
        self._optimizer = optimizer
        self._planned: tuple[list[ParameterState], Beside[AdapterWriter] | None] | None = None
        """The states of the plan made ahead, and the plan; no plan on a rank that could not begin one."""

    def plan_ahead(self) -> None:
        """See Saver. Megatron's plan of some 3,000 parts of tensors takes about a second of Python."""
        states = self._live_states()
        self._planned = states, self._begin_plan(states)

    def _begin_plan(self, states: list[ParameterState]) -> Beside[AdapterWriter] | None:
        """Return the plan that has begun, or None if this rank has no group or no thread for it.

        Then all ranks plan when they save: the training does not depend on a plan.
        """
        model = self._model
        try:
            group = dist.new_group(backend="gloo", timeout=timedelta(minutes=self._timeout))

            def plan() -> AdapterWriter:
                with unnoted():
                    return AdapterWriter(adapter_shards(model, states), group)

            return Beside(plan, "plan of the checkpoints")
        except (OSError, MemoryError, RuntimeError) as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("The files of checkpoints cannot be planned ahead, so the first save takes longer: %s", why)
            return None

    def _new_copy(self) -> HostCopy:
        return AdapterCopy(self._model, self._optimizer)

    def _live_states(self) -> list[ParameterState]:
        return live_states(self._model, self._optimizer)

    def _writer_of(self, states: list[ParameterState], copy: HostCopy | None) -> FileWriter:
        if copy is None and self._planned is not None:
            planned, plan = self._planned
            if self._all_can_use(plan, fits=_are_same(planned, states)):
                assert plan is not None
                return plan.result()
            # Its thread may wait for other ranks in the group that only it uses. Nobody waits for the thread.
            self._planned = None
        return AdapterWriter(adapter_shards(self._model, states))

    def _all_can_use(self, plan: Beside[AdapterWriter] | None, *, fits: bool) -> bool:
        """Return True if the plan made ahead is ready on all ranks. All ranks must call, and get the same answer.

        False if it failed on one of them, does not fit what is saved there, or takes longer than PLAN_SECONDS. While
        the ranks wait they keep asking, which shows a rank that is gone, and to the heartbeat one that hangs.
        """
        late = time.monotonic() + PLAN_SECONDS
        while True:
            is_running = plan is not None and plan.is_running
            is_lost = not fits or plan is None or plan.has_failed or (is_running and time.monotonic() > late)
            state = torch.tensor(_UNUSABLE if is_lost else _RUNNING if is_running else _READY)
            if self._model.mesh.world_size > 1:
                dist.all_reduce(state, op=dist.ReduceOp.MIN)
            if float(state) != _RUNNING:
                return float(state) == _READY
            assert plan is not None
            plan.wait(WAIT_SECONDS)


def _are_same(planned: Sequence[ParameterState], states: Sequence[ParameterState]) -> bool:
    """Return True if both are made of the same tensors. The optimizer's moments may be newer than the plan."""

    def addresses(state: ParameterState) -> tuple[object, ...]:
        return state.name, *state.moments, *(each.data_ptr() for each in state.tensors)

    return [addresses(each) for each in planned] == [addresses(each) for each in states]


def _allocate_everywhere(copy: HostCopy) -> str | None:
    """Allocate the copies of all ranks. Return None, or which ranks have no memory for theirs. All ranks must call."""
    problem = None
    try:
        copy.allocate()
    except (MemoryError, RuntimeError) as error:
        problem = (str(error) or type(error).__name__).splitlines()[0]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, problem)
    return "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(found) if each is not None) or None


def begin(target: SaveTarget, tokenizer: Path | None) -> None:
    """Make the folder of a checkpoint that is not complete yet, and copy the tokenizer. One process calls."""
    check_held()
    shutil.rmtree(target.partial, ignore_errors=True)
    target.partial.mkdir(parents=True)
    if tokenizer is not None and not (target.folder / TOKENIZER).exists():
        partial = target.folder / f".{TOKENIZER}.partial"
        copy_tokenizer(tokenizer, partial)
        partial.rename(target.folder / TOKENIZER)


def complete(
    target: SaveTarget,
    request: SaveRequest,
    architecture: Mapping[str, Any],
    sums: Mapping[str, str],
    kind: str,
) -> None:
    """Write the small files and then the names. One process calls. Raises HostError if another run has the folder now.

    Args:
        sums: checksums of the .distcp files by their names.
        kind: of the manifest.
    """
    folder, partial, iteration = target.folder, target.partial, target.iteration
    torch.save({"checkpoint_version": 3.0, "iteration": iteration}, partial / "common.pt")
    write_metadata_json(partial)
    names = [each.name for each in partial.iterdir() if each.name not in sums]
    tokenizer_files = [each.name for each in (folder / TOKENIZER).glob("*") if each.is_file()]
    write_manifest(
        partial,
        kind,
        architecture=architecture,
        iteration=iteration,
        **request.description,
        state=request.state.to_mapping(),
        tokenizer_files=checksums(folder / TOKENIZER, tokenizer_files),
        files={**sums, **checksums(partial, names)},
    )
    sync_folder_and_files(partial)
    check_held()
    # What is left of it shows that a save was cut off between the two renames.
    write_atomically(folder / NEXT_MARKER, f"{iteration}\n")
    if target.final.exists():
        shutil.rmtree(target.final)
    check_held()
    partial.rename(target.final)
    sync_folder_and_files(folder)
    (folder / NEXT_MARKER).rename(folder / LATEST)
    sync_folder_and_files(folder)
