"""The planner and `--recompute offload`: what stays on the GPU, what goes to RAM, and when it is offered."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.errors import ConfigError
from mixtral_run.planner.memory_model import (
    host_bytes,
    memory,
)
from mixtral_run.planner.ranking import ranked
from mixtral_run.planner.workload import GIB, Layout, Workload

LONG = Workload(gpus=8, seq_length=24576, expert_chunks=1)
"""With TP1/EP8 too long for 32 GiB while every layer keeps its input on the GPU."""


def test_offload_leaves_two_inputs_on_the_gpu_and_all_in_ram() -> None:
    inputs = 24576 * 4096 * 2
    full, offload = (memory(LONG, Layout(1, 8, mode)) for mode in ("full", "offload"))
    assert dataclasses.replace(offload, activations=full.activations) == full
    assert (full.activations, offload.activations) == (32 * inputs, 2 * inputs)
    # Blocks of powers of two, for each layer on each of the eight GPUs.
    assert host_bytes(LONG, Layout(1, 8, "offload")) == 8 * 32 * 256 * 1024**2 > 8 * 32 * inputs
    assert host_bytes(LONG, Layout(2, 8, "offload")) == 8 * 32 * 128 * 1024**2
    assert host_bytes(LONG, Layout(1, 8, "full")) == 0
    # A host has its own GPUs to keep for.
    spread = dataclasses.replace(LONG, gpus=32)
    assert host_bytes(spread, Layout(1, 8, "offload")) == host_bytes(LONG, Layout(1, 8, "offload"))
    alone = dataclasses.replace(LONG, gpus=1)
    assert host_bytes(alone, Layout(1, 1, "offload")) == 32 * 256 * 1024**2


def test_offload_comes_after_all_that_fits_without() -> None:
    for gib in (18, 24, 32, 80, 160):
        fitting = [each.layout.recompute == "offload" for each in ranked(LONG, gib * GIB) if each.fits]
        assert fitting == sorted(fitting)
    choices = {str(each.layout): each.fits for each in ranked(LONG, 32 * GIB) if each.layout.recompute == "full"}
    assert not choices["TP1/EP8"]
    assert choices["TP2/EP8"]


def test_offload_needs_its_ram() -> None:
    def fits(host_gib: float) -> set[str]:
        choices = ranked(LONG, 32 * GIB, host_gib * GIB)
        return {str(each.layout) for each in choices if each.fits and each.layout.recompute == "offload"}

    # 64 GiB with TP1/EP8, 32 with TP2: a fifth of the RAM is left alone.
    assert "TP1/EP8" in fits(81)
    assert "TP1/EP8" not in fits(79)
    assert "TP2/EP8" in fits(79)
    assert fits(1) == set()


def test_the_verb_shows_offload_where_a_layout_needs_it() -> None:
    words = ["plan", "--gpus", "8", "--gpu-memory", "32", "--seq-length", "24576", "--expert-chunks", "1"]
    rows = [line.split("│") for line in CliRunner().invoke(root, words, env={"COLUMNS": "200"}).output.splitlines()]
    shown = {row[1].strip(): row[-3].strip() for row in rows if len(row) > 3 and row[2].strip() == "offload"}
    assert shown == {"TP1/EP8": "64.0"}
    without = CliRunner().invoke(root, [*words, "--host-memory", "64"], env={"COLUMNS": "200"}).output
    assert "TP1/EP8" not in without and "TP2/EP8" in without
    listed = json.loads(CliRunner().invoke(root, [*words, "--json"]).output)["layouts"]
    assert {each["host_gib"] for each in listed if each["recompute"] == "full"} == {0.0}
    assert {each["saved_copy_gib"] for each in listed} == {2.45}  # 12 bytes a parameter of the adapters
    alone = [
        "plan",
        "--gpus",
        "1",
        "--gpu-memory",
        "110",
        "--seq-length",
        "32768",
        "--host-memory",
        "8",
        "--expert-chunks",
        "1",
    ]
    with pytest.raises(ConfigError, match="80% of 8 GiB of a host's RAM"):
        CliRunner().invoke(root, alone, catch_exceptions=False)
