"""Comparison of the files of an iteration with their checksums by all ranks together, each its share."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.weights.manifest.adapter_files import (
    file_problems,
    marker_problems,
    raise_if_damaged,
    tokenizer_file_problems,
)
from mixtral_run.weights.manifest.checkpoint_folder import open_checkpoint
from mixtral_run.weights.manifest.describe import AdapterDescription, TrainedDescription


def check_saved_files(adapter: AdapterDescription | TrainedDescription, mesh: Mesh) -> None:
    """Raise WeightsError on all ranks naming each file that is not what was written. All ranks must call.

    An adapter without checksums, of an earlier version of the kit, passes.
    """
    names = sorted(adapter.files)[mesh.rank :: mesh.world_size]
    problems = file_problems(adapter.folder, adapter.files, names)
    if mesh.is_first:
        checkpoint = open_checkpoint(adapter.folder)
        problems += marker_problems(checkpoint.folder, adapter.folder) + tokenizer_file_problems(checkpoint)
    gathered: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(gathered, problems)
    raise_if_damaged(adapter.folder, [line for lines in gathered for line in lines])
