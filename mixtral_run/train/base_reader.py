"""Reading a base checkpoint into the parts of a model as their memory becomes available, each rank its own parts."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mixtral_run.errors import WeightsError
from mixtral_run.model.parallel.megatron import ShardedTensor
from mixtral_run.weights.load.read_parts import Target
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.manifest.base_checkpoint import is_of_model
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader


class BaseReader:
    """A checkpoint whose parts are read on request. A failure is stored until `agree` raises it on all ranks.

    folder: the folder of the iteration. wanted: selects the tensors by their keys; other state, such as the
    optimizer's, is ignored.
    """

    def __init__(self, folder: Path, wanted: Callable[[str], bool] = is_of_model) -> None:
        self._folder = folder
        self._wanted = wanted
        self._checkpoint: Reader | None = None
        self._failed: WeightsError | None = None

    def __enter__(self) -> BaseReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()

    def read(self, shards: Iterable[ShardedTensor]) -> None:
        """Fill the shards' own storage; do nothing after a failure. No rank waits for another."""
        if self._failed is not None:
            return
        try:
            wanted = list(shards)
            checkpoint = self._opened()
            for shard in wanted:
                self._prepare(shard, checkpoint)
            fill(checkpoint, map(target_of, wanted))
        except WeightsError as error:
            self._failed = error

    def agree(self) -> None:
        """Raise the failure of any rank on all of them: the others would wait for it otherwise. All ranks must call."""
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, self._failed)
        for failed in outcomes:
            if failed is not None:
                raise failed

    def _opened(self) -> Reader:
        if self._checkpoint is None:
            self._checkpoint = Reader(self._folder, self._wanted)
        return self._checkpoint

    def _prepare(self, shard: ShardedTensor, checkpoint: Reader) -> None:
        stored = checkpoint.tensors.get(shard.key)
        if stored is None or stored.shape == tuple(shard.global_shape):
            return
        if not shard.allow_shape_mismatch:
            raise WeightsError(
                "The checkpoint cannot be loaded into this model.",
                where=f"{self._folder}, {shard.key}",
                expected=f"shape {list(shard.global_shape)}",
                found=f"shape {list(stored.shape)}",
                next_command=f"mixtral-run verify --load {shlex.quote(str(self._folder.parent))}",
            )
        # The vocabulary is padded differently: rows that the checkpoint lacks are zeros, as when Megatron loads it.
        shard.data.detach().zero_()


def target_of(shard: ShardedTensor) -> Target:
    """Return the shard's place in the global tensor, which has axes for layers and experts that the data lacks."""
    missing = len(shard.global_offset) - shard.data.dim()
    return Target(shard.key, tuple(shard.global_offset), (*(1,) * missing, *shard.data.shape), shard.data.detach())
