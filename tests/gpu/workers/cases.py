"""Command line that the workers under torchrun share: OUT.json TPxEP:WORD:WORD …, each case in its layout."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.parallel.mesh import Mesh, open_mesh


def run_cases(run: Callable[[Mesh, str, str], Any]) -> None:
    """Write what each case of the command line gives, by case. All ranks must call."""
    warnings.filterwarnings("ignore")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    found = {}
    for case in sys.argv[2:]:
        layout, first, second = case.split(":")
        tp, ep = (int(number) for number in layout.split("x"))
        config = LaunchConfig(tensor_model_parallel_size=tp, expert_model_parallel_size=ep, device="cuda")
        with open_mesh(config) as mesh:
            found[case] = run(mesh, first, second)
    if torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    torch.distributed.destroy_process_group()
