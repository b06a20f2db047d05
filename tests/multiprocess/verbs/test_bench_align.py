"""The bench of `align`, at toy size: every case runs from the start of the adapters, and counts its tokens."""

from __future__ import annotations

import json
import math

import pytest

from benchmarks.align import main

VOCABULARY = 64


def test_every_method_runs_beside_supervised_training(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--layers", "1", "--hidden-size", "128", "--ffn-hidden-size", "96", "--vocab-size", str(VOCABULARY))
    main(
        [
            *sizes,
            "--device",
            "cpu",
            "--seq-lengths",
            "16",
            "--steps",
            "1",
            "--cases",
            "sft,dpo,kto,orpo,simpo,sft:eager",
        ]
    )
    found = {line["case"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert list(found) == ["sft", "dpo", "kto", "orpo", "simpo", "sft:eager"]
    # The adapters start at 0, so that the model is its reference, and random weights choose among all tokens alike.
    first = {case: line["losses"][0] for case, line in found.items()}
    assert (first["dpo"], first["kto"]) == (pytest.approx(math.log(2), abs=1e-4), pytest.approx(0.5, abs=1e-4))
    assert first["sft"] == pytest.approx(math.log(VOCABULARY), abs=0.3)
    assert first["orpo"] == pytest.approx(math.log(VOCABULARY) + 0.1 * math.log(2), abs=0.3)
    assert first["simpo"] == pytest.approx(math.log(1 + math.exp(0.5)), abs=0.3)
    # The methods between them have left nothing behind.
    assert found["sft"]["losses"] == found["sft:eager"]["losses"]
    assert {line["tokens"] for line in found.values()} == {2 * 16}
    assert len({line["planned_gib"] for line in found.values()}) == 1 and found["sft"]["planned_gib"] > 0
    assert all(line["tok_s"] > 0 for line in found.values())
    assert {case for case, line in found.items() if line.get("reference_tok_s", 0) > 0} == {"dpo", "kto"}
