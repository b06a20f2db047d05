"""Megatron is imported only where it is used, without torch's compiler and loggers; both are restored afterwards."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, sys, torch
compile_with_torch = torch.compile
first, second = (each.split(",") for each in sys.argv[1:])
for name in first:
    importlib.import_module(name)
assert "megatron" not in sys.modules
for name in second:
    importlib.import_module(name)
assert "megatron.core" in sys.modules
assert torch.compile is compile_with_torch
from mixtral_run.model.recompute.checkpoint import checkpoint
from mixtral_run.train.steps.eager_optimizer import SGD, AdamW
weight = torch.ones(2, requires_grad=True)
for optimizer in (AdamW([weight], fused=True), SGD([weight])):
    optimizer.zero_grad()
    checkpoint(torch.sin, weight, use_reentrant=True).sum().backward()
    optimizer.step()
unwanted = ("torch._inductor.", "torch._dynamo.", "wandb", "tensorboard")
print(*(name for name in sys.modules if name.startswith(unwanted)))
import torch.utils.tensorboard
"""
LAUNCHER = (
    "cli.commands.finetune", "planner.choose", "train.preflight", "train.checkpoints.init_adapter",
    "train.checkpoints.resume_checks",
)  # fmt: skip
"""What `finetune` imports before it starts its processes."""
MODULES = (
    "train.loop", "inference.generate", "trial.logits_parity", "train.checkpoints.checkpoint", "model.adapters.lora",
)  # fmt: skip


def test_no_process_loads_the_compiler() -> None:
    """One process imports all that processes of jobs do: what none of them loads alone is not there together."""
    names = [",".join(f"mixtral_run.{name}" for name in group) for group in (LAUNCHER, MODULES)]
    argv = [sys.executable, "-W", "ignore", "-c", PROGRAM, *names]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split() == []
