"""Megatron is imported without torch's compiler, and torch.compile is restored afterwards."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import importlib, sys, torch
compile_with_torch = torch.compile
for name in sys.argv[1:]:
    importlib.import_module(name)
assert "megatron.core" in sys.modules
assert torch.compile is compile_with_torch
print(*(name for name in sys.modules if name.startswith(("torch._inductor.", "torch._dynamo."))))
"""
MODULES = (
    "train.loop", "inference.generate", "trial.logits_parity", "train.checkpoints.checkpoint", "model.adapters.lora",
)  # fmt: skip


def test_no_process_loads_the_compiler() -> None:
    """One process imports all that processes of jobs do: what none of them loads alone is not there together."""
    argv = [sys.executable, "-W", "ignore", "-c", PROGRAM, *(f"mixtral_run.{name}" for name in MODULES)]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split() == []
