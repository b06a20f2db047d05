"""The bench of a quantized base's loss, at toy size: it runs, learns and compares."""

from __future__ import annotations

import json

import pytest

from benchmarks.base_loss import BASES, compared, main


def test_base_and_adapters_learn_at_every_precision(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--device", "cpu", "--tiny"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["base"]["last"] < 0.75 * found["base"]["first"]
    assert tuple(found["lora"]) == BASES
    for run in found["lora"].values():
        assert list(run["losses"]) == ["1", "5", "10", "20"]
        assert run["first_again"] < run["losses"]["1"]
    apart = {precision: run["mean"] for precision, run in found["lora"].items()}
    # Above nothing: the base was quantized. Below: it is the same base still.
    assert apart["bf16"] == 0
    assert all(0 < apart[precision] < 0.1 for precision in ("fp8", "nf4", "fp8+attention"))
    assert apart["fp8"] != apart["fp8+attention"]


def test_losses_are_compared_as_shares_of_the_others() -> None:
    assert compared([1.1, 1.8], [1.0, 2.0]) == pytest.approx({"mean": 0.1, "max": 0.1, "last": -0.1 / 3})
