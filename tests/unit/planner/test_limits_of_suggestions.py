"""What is suggested, how far, and what memory is said to be needed; numbers are written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.planner import available, suggestions
from mixtral_run.planner.available import AvailableGpu
from mixtral_run.planner.memory_model import EXPERT_BYTES
from mixtral_run.planner.spread import spread_layout
from mixtral_run.planner.workload import Workload


def workload(**values: Any) -> Workload:
    return Workload(**{"architecture": MIXTRAL_8X7B, "gpus": 2, "micro_batch_size": 8, "seq_length": 500, **values})


def asked(monkeypatch: pytest.MonkeyPatch, fits: Any, **values: Any) -> tuple[list[str], list[Workload]]:
    tried: list[Workload] = []

    def check(each: Workload, gpu: float, host: float) -> bool:
        assert (gpu, host) == (80.0, 90.0)
        tried.append(each)
        return bool(fits(each))

    monkeypatch.setattr(suggestions, "_fits", check)
    return suggestions.remedies(workload(**values), 80.0, 90.0), tried


def test_all_that_is_tried_where_nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    found, tried = asked(monkeypatch, lambda _: False)
    assert found == []
    widths = sorted(EXPERT_BYTES.values(), reverse=True)
    least = widths[-1]
    first = [(each.expert_bytes, each.micro_batch_size, each.seq_length, each.gpus) for each in tried]
    here = widths[0] if workload().expert_bytes == widths[0] else workload().expert_bytes
    others = [
        *((here, size, 500, 2) for size in (4, 2, 1)),
        *((here, 8, length, 2) for length in (250, 125)),
        *((here, 8, 500, gpus) for gpus in (4, 8, 16, 32, 64)),
    ]
    narrower = [(size, 8, 500, 2) for size in widths if size < here]
    again = [(least, *each[1:]) for each in others]
    assert first == [*narrower, *others, *again]
    # 64 tokens are the least.
    _, tried = asked(monkeypatch, lambda _: False, seq_length=256)
    assert min(each.seq_length for each in tried) == 64
    _, tried = asked(monkeypatch, lambda _: False, seq_length=127)
    assert {each.seq_length for each in tried} == {127}


def test_the_smallest_change_of_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = asked(monkeypatch, lambda each: each.micro_batch_size <= 2 or each.gpus >= 8)
    assert found == ["--micro-batch-size 2", "--gpus 8"]
    # More GPUs alone: combined with the fewest bits, what helps on the given ones comes first.
    smallest = min(EXPERT_BYTES, key=EXPERT_BYTES.__getitem__)
    least = EXPERT_BYTES[smallest]
    found, _ = asked(
        monkeypatch, lambda each: each.gpus >= 8 or (each.expert_bytes == least and each.seq_length <= 250)
    )
    assert found == [f"--base-precision {smallest} --seq-length 250", "--gpus 8"]
    found, tried = asked(monkeypatch, lambda each: each.gpus >= 8, expert_bytes=least)
    assert found == ["--gpus 8"] and {each.expert_bytes for each in tried} == {least}


def test_only_the_best_layout_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for fits in ([], [False, True], [True, False]):
        monkeypatch.setattr(suggestions, "ranked", lambda *_, fits=fits: [SimpleNamespace(fits=each) for each in fits])
        assert suggestions._fits(workload(), 1.0, 1.0) is (fits[:1] == [True])


@pytest.mark.parametrize(
    ("dtype", "base", "free", "gpu", "warning"),
    [
        # 46,702,792,704 parameters: twice, 2 or 4 bytes, and a fifth more.
        ("auto", "bfloat16", 225e9, None, None),
        ("auto", "bfloat16", 224e9, None, "both models need 224 GB of memory, 224 GB are free"),
        ("auto", "float32", 225e9, None, "both models need 448 GB of memory, 225 GB are free"),
        ("fp32", "bfloat16", 440e9, None, "both models need 448 GB of memory, 440 GB are free"),
        ("bf16", "float32", 225e9, None, None),
        # Two GPUs hold half of the kit's model each.
        ("bf16", "bfloat16", 225e9, 47e9, None),
        ("bf16", "bfloat16", 225e9, 46e9, "the weights on each GPU need 47 GB of memory, 46 GB are free"),
        ("bf16", "bfloat16", 100e9, 80e9, "both models need 224 GB of memory, 100 GB are free"),
    ],
)
def test_memory_for_a_comparison_of_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    dtype: str, base: str, free: float, gpu: float | None, warning: str | None,
) -> None:  # fmt: skip
    import psutil

    described = SimpleNamespace(dtype=base, architecture=MIXTRAL_8X7B)
    monkeypatch.setattr(available, "describe_base", lambda _: described)
    monkeypatch.setattr(available, "process_count", lambda _: 2)
    found = None if gpu is None else AvailableGpu(gpu, gpu, (9, 0))
    monkeypatch.setattr(available, "available_gpu", lambda *_: found)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    for as_json in (False, True):
        config: Any = SimpleNamespace(load=Path("base"), dtype=dtype, device="auto", json=as_json)
        assert available.logits_fit(config) is (warning is None)
        output, errors = capsys.readouterr()
        text = " ".join((output + errors).split())
        assert (f"logits not compared: {warning} (every tensor was compared)" in text) == (warning is not None)
        if as_json:
            assert output == ""


def test_sizes_that_were_given_are_kept() -> None:
    def config(tp: int | None, ep: int | None) -> Any:
        return SimpleNamespace(tensor_model_parallel_size=tp, expert_model_parallel_size=ep, context_size=1)

    def chosen(tp: int | None, ep: int | None, processes: int, fits: Any = lambda _: True) -> tuple[int, int]:
        found = spread_layout(config(tp, ep), MIXTRAL_8X7B, processes, "none", fits)
        assert (found.recompute, found.context_parallel_size) == ("none", 1)
        return found.tensor_model_parallel_size, found.expert_model_parallel_size

    assert chosen(None, None, 8) == (1, 8)
    assert chosen(None, None, 6) == (1, 2)
    assert chosen(4, None, 8) == (4, 8) and chosen(None, 2, 8) == (1, 2) and chosen(2, 4, 8) == (2, 4)
    # The first that fits; if none does, the last that is possible.
    assert chosen(None, None, 8, lambda each: each.tensor_model_parallel_size > 1) == (2, 8)
    assert chosen(None, None, 8, lambda each: each.expert_model_parallel_size < 8) == (1, 4)
    assert chosen(None, None, 8, lambda _: False) == (8, 1)
    # Not possible: what was given, for the checks to refuse.
    assert (chosen(3, None, 3), chosen(None, 3, 3), chosen(3, 5, 15)) == ((3, 1), (1, 3), (3, 5))
