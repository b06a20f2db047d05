"""Megatron is imported without torch's compiler, and torch.compile is restored afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, sys, torch
compile_with_torch = torch.compile
importlib.import_module(sys.argv[1])
assert "megatron.core" in sys.modules
assert torch.compile is compile_with_torch
print(*(name for name in sys.modules if name.startswith(("torch._inductor.", "torch._dynamo."))))
"""


@pytest.mark.parametrize(
    "module",
    ["train.loop", "inference.generate", "trial.logits_parity", "train.checkpoints.checkpoint", "model.adapters.lora"],
)
def test_no_process_loads_the_compiler(module: str) -> None:
    argv = [sys.executable, "-W", "ignore", "-c", PROGRAM, f"mixtral_run.{module}"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split() == []
