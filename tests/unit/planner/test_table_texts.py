"""Rows, titles, errors and JSON of the planner's tables, for choices of which every number is written out."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.planner import full_table, table
from mixtral_run.planner.full_table import PARTS as FULL_PARTS
from mixtral_run.planner.ranking import Choice
from mixtral_run.planner.table import PARTS, PlannedGpu
from mixtral_run.planner.workload import GIB, Layout, Memory, Workload

MEMORY = Memory(*(each * GIB for each in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.06)))
"""Weights 1 GiB, adapters 2, gradients 4, optimizer 8, activations 16, buffers 32, context 0.06: 63.06 in all."""


def choice(layout: Layout = Layout(1, 2, "full"), fits: bool = True, **values: Any) -> Choice:  # noqa: B008
    given = {"memory": MEMORY, "host_bytes": 0.0, "relative_speed": 0.685, **values}
    return Choice(layout=layout, fits=fits, **given)


def test_rows_of_the_table() -> None:
    whole = {name: (name,) for name in PARTS}
    parts = ("1.0", "2.0", "4.0", "8.0", "16.0", "32.0", "0.1")
    assert table._row(choice(), whole) == ("TP1/EP2", "full", "✓", *parts, "63.1", "–", "68%")
    chunks = choice(Layout(2, 1, "full", 1, 3), False, host_bytes=1.5 * GIB)
    assert table._row(chunks, {"two": ("gradients", "optimizer")}) == (
        str(chunks.layout), "full/3", "✗", "12.0", "63.1", "1.5", "68%",
    )  # fmt: skip
    assert table._row(choice(Layout(1, 2, "full", recompute_layers=9)), {})[1] == "full×9"
    assert table._row(choice(Layout(1, 2, "except-attention", 1, 3)), {})[1] == "except/3"
    full: Any = SimpleNamespace(layout=Layout(1, 2, "full"), offload=True, host_bytes=3 * GIB, fits=True, memory=MEMORY)
    found = full_table._row(full, {"one": ("weights",)})
    assert found == ("TP1/EP2", "full", "host", "✓", "1.0", "63.1", "3.0")
    full.offload, full.host_bytes, full.fits = False, 0.0, False
    assert full_table._row(full, {"one": ("weights",)}) == ("TP1/EP2", "full", "GPU", "✗", "1.0", "63.1", "–")


def test_what_is_said_where_nothing_fits() -> None:
    small = dataclasses.replace(MEMORY, buffers=0.0)
    choices = [choice(), choice(Layout(1, 4, "offload"), memory=small, host_bytes=2.5 * GIB)]
    text = f"31.1 GiB with {choices[1].layout}, --recompute offload, the smallest"
    assert table._smallest(choices) == f"{text}, and 2.5 GiB of a host's RAM"
    assert table._smallest([choice()]) == f"63.1 GiB with {choice().layout}, --recompute full, the smallest"
    none = "no layout that splits the model and the sequence over these GPUs"
    assert table._smallest([]) == none
    workload = Workload(gpus=4)
    config = PlanConfig(full=True, gpus=4)
    error = full_table.no_fit(config, choices, workload, 79.123456, 100 * GIB)  # type: ignore[arg-type]
    assert error.found == f"{text}, and 2.5 GiB of a host's RAM"
    assert error.expected == "at most 97% of 79.12 GiB on each of 4 GPUs, 80% of 100 GiB of a host's RAM"
    error = full_table.no_fit(config, [], workload, 80.0, math.inf)
    assert (error.found, error.expected) == (none, "at most 97% of 80 GiB on each of 4 GPUs")


@pytest.mark.parametrize(("host", "fits"), [(15.0, True), (14.99, False)])
def test_the_copy_of_a_save_needs_its_part_of_the_ram(host: float, fits: bool) -> None:
    """4 GiB are pinned and 8 are copied, of four fifths of the RAM."""
    best: Any = SimpleNamespace(host_bytes=4 * GIB)
    line = full_table._copy_line(8 * GIB, best, host * GIB)
    assert line.startswith("a host's RAM: 8 GiB more for saves" if fits else "the training waits for each save")
    assert "8 GiB more" in line


@pytest.mark.parametrize(
    ("layouts", "shown"),
    [
        ([Layout(1, 2, "none"), Layout(1, 2, "offload")], [0]),
        ([Layout(1, 2, "offload"), Layout(2, 1, "none")], [0, 1]),
        ([Layout(1, 2, "full"), Layout(1, 2, "full", 1, 2)], [0]),
        ([Layout(1, 2, "full", 1, 2), Layout(1, 2, "none")], [0, 1]),
        ([Layout(1, 2, "full", 1, 2), Layout(2, 1, "full")], [0, 1]),
        ([Layout(1, 2, "full"), Layout(1, 2, "full", recompute_layers=9), Layout(2, 1, "full")], [1, 2]),
        ([Layout(1, 2, "except-attention"), Layout(1, 2, "full", recompute_layers=9)], [0, 1]),
    ],
)
def test_last_resorts_are_shown_where_nothing_else_fits(layouts: list[Layout], shown: list[int]) -> None:
    choices = [choice(each) for each in layouts]
    assert table._worth_showing([*choices, choice(Layout(8, 1, "none"), False)]) == [choices[each] for each in shown]


def test_mappings_have_gib_with_two_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "saved_copy_bytes", lambda *_: 1.234 * GIB)
    monkeypatch.setattr(
        table, "faster_micro_batch", lambda *given: (4, choice(), 1.23456) if given[2] == 80 * GIB else None
    )
    config: Any = SimpleNamespace(gpus=2, hosts=3)
    gpu = PlannedGpu(80.0, (9, 0), "flag")
    parts = dict(zip(PARTS, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 0.06), strict=True))
    monkeypatch.setattr(table, "scaling", lambda *_: None)
    found = table._to_mapping(
        SimpleNamespace(**{**vars(config), "hosts": 1}), Workload(), gpu, [choice(host_bytes=2.345 * GIB)]
    )  # type: ignore[arg-type]
    assert (found["gpus"], found["gpu_memory_gib"], found["compute_capability"], found["scaling"]) == (
        2,
        80.0,
        "9.0",
        None,
    )
    assert found["faster_micro_batch"]["rate"] == 1.235 and found["faster_micro_batch"]["total_gib"] == 63.06
    (layout,) = found["layouts"]
    assert layout["parts_gib"] == parts and layout["total_gib"] == 63.06
    assert (layout["relative_speed"], layout["host_gib"], layout["saved_copy_gib"]) == (0.685, 2.35, 1.23)
    assert (layout["tensor_model_parallel_size"], layout["fits"]) == (1, True)
    nothing = table._to_mapping(config, Workload(), gpu, [choice(fits=False)])
    assert nothing["faster_micro_batch"] is None and nothing["scaling"] is None
    assert table._to_mapping(config, Workload(), gpu, [])["layouts"] == []
    monkeypatch.setattr(full_table, "full_copy_bytes", lambda *_: 1.234 * GIB)
    one: Any = SimpleNamespace(
        layout=Layout(1, 2, "full"), offload=True, host_bytes=2.345 * GIB, fits=True, memory=MEMORY
    )
    full = full_table._to_mapping(config, Workload(), 80.0, [one])
    assert (full["gpus"], full["gpu_memory_gib"]) == (6, 80.0)
    (layout,) = full["layouts"]
    assert (layout["total_gib"], layout["host_gib"], layout["saved_copy_gib"]) == (63.06, 2.35, 1.23)
    assert layout["parts_gib"] == {name: parts[name] for name in FULL_PARTS}
    assert (layout["offload_optimizer"], layout["fits"], layout["recompute"]) == (True, True, "full")


def test_the_title_and_the_next_plan() -> None:
    flags = {"gpus": "--gpus 2", "seq_length": "--seq-length 512", "micro_batch_size": "--micro-batch-size 4"}
    config: Any = SimpleNamespace(
        lora_rank=16,
        gpus=2,
        seq_length=4096,
        flags=lambda names: [text for name, text in flags.items() if name in names],
    )
    title = table._title(config, Workload(micro_batch_size=3), PlannedGpu(79.1, (9, 0), "flag"))
    assert title == ("LoRA r=16 on 46.7 B parameters, 2 × 79.1 GiB (84.9 GB), seq 4,096 × 3; GiB a GPU, RAM a host")
    assert PlannedGpu(1.0, (12, 0), "flag").capability == "12.0"
