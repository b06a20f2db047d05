"""The place of one save, and the steps of it that succeed or fail on all ranks together."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from mixtral_run.errors import HostError, MixtralRunError, TrainingError
from mixtral_run.model.parallel.mesh import Mesh, is_out_of_memory
from mixtral_run.train.checkpoints.save_failure import save_failure

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class SaveTarget:
    """One save.

    Attributes:
        folder: the folder of the run.
        iteration: the number of finished iterations.
        group: processes of the save's own collectives, all ranks; None for the group of the training.
        what: what is saved, for messages.
    """

    mesh: Mesh
    folder: Path
    iteration: int
    group: dist.ProcessGroup | None = None
    what: str = "adapter"

    @property
    def final(self) -> Path:
        """Return the iteration's folder."""
        return self.folder / f"iter_{self.iteration:07d}"

    @property
    def partial(self) -> Path:
        """Return the iteration's folder until it is complete."""
        return self.folder / f".{self.final.name}.partial"

    def on_all_ranks(self, step: Callable[[], ResultT]) -> ResultT:
        """Run a rank-local step. All ranks must call.

        Raises TrainingError on all ranks if the step fails on one of them; the unfinished folder is removed before, as
        the disk may be full. On the failing rank memory that ran out, and errors that no disk causes, are raised as
        they are.
        """
        result, failed = None, None
        try:
            result = step()
        # torch's CheckpointException derives from BaseException, not from Exception.
        except (CheckpointException, Exception) as error:
            failed = error
        found: list[Any] = [None] * self.mesh.world_size
        dist.all_gather_object(found, None if failed is None else self._translated(failed), group=self.group)
        errors = [error for error in found if error is not None]
        if not errors:
            return result  # type: ignore[return-value]
        # A HostError is a lock that was lost: then the folder is another run's.
        if self.mesh.is_first and not any(isinstance(each, HostError) for each in errors):
            shutil.rmtree(self.partial, ignore_errors=True)
        if failed is not None and (is_out_of_memory(failed) or not isinstance(failed, OSError | RuntimeError)):
            raise failed
        raise errors[0] from failed

    def on_first_rank(self, step: Callable[[], object]) -> None:
        """Run a step on the first rank, as `on_all_ranks` does. All ranks must call."""
        self.on_all_ranks(step if self.mesh.is_first else lambda: None)

    def gather(self, value: object) -> list[Any]:
        """Return the values of all ranks on the first rank, nothing on others. All ranks must call."""
        found: list[Any] | None = [None] * self.mesh.world_size if self.mesh.is_first else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found or []

    def _translated(self, error: BaseException) -> MixtralRunError:
        if isinstance(error, MixtralRunError):
            return error
        return TrainingError(
            f"The {self.what} of iteration {self.iteration} cannot be saved.",
            where=str(self.folder),
            found=save_failure(error, self.folder, self.mesh.rank),
            next_command=f"df -h {shlex.quote(str(self.folder))}, then the same command with --resume",
        )
