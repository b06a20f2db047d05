"""The verbs with a quantized cache next to the base."""

import json
from pathlib import Path

from mixtral_run.train.metrics import read_metrics
from tests.multiprocess.conftest import mixtral_run
from tests.support.quantized_cache import STALE, edit_record, flip, folder_of, start, wipe_experts


def test_the_verb_keeps_reads_and_does_without(own_checkpoint: Path, tmp_path: Path) -> None:
    words = ["finetune", "--load", str(own_checkpoint), "--mock-data", "--device", "cpu", "--layout", "auto"]
    words += ["--seq-length", "16", "--train-iters", "2", "--base-precision", "fp8", "--lr", "1e-2"]
    losses, said = [], []
    for number, flags in enumerate((["--keep-quantised", "no"], [], [], ["--quantized-cache", "use"])):
        save = tmp_path / f"adapter{number}"
        done = mixtral_run(*words, "--save", str(save), *flags)
        assert done.returncode == 0, done.stderr
        losses.append([each["loss"] for each in read_metrics(save / "metrics.jsonl")])
        said.append(done.stdout)
        if number == 0:
            assert not folder_of(own_checkpoint).exists()
    assert len(losses[0]) == 2
    assert all(each == losses[0] for each in losses)
    assert [("Writing the quantized cache" in text, "from the quantized cache" in text) for text in said] == [
        (False, False),
        (True, False),
        (False, True),
        (False, True),
    ]
    wrong = mixtral_run(*words, "--save", str(tmp_path / "more"), "--quantized-cache", "maybe")
    assert wrong.returncode == 2


def test_verify_names_and_checks_it(own_checkpoint: Path) -> None:
    start(own_checkpoint)
    reported = json.loads(mixtral_run("verify", "--load", str(own_checkpoint), "--json").stdout)
    assert reported["ok"]
    assert reported["kept"]["fp8"]["used"]
    assert reported["kept"]["fp8"]["num_bytes"] == sum(
        file.stat().st_size for file in folder_of(own_checkpoint).glob("*.safetensors")
    )
    whole = mixtral_run("verify", "--load", str(own_checkpoint), "--proof")
    assert whole.returncode == 0, whole.stderr
    assert "quantised-fp8: every byte is what was written" in whole.stdout
    flip(folder_of(own_checkpoint) / "layer_00.safetensors", 9000)
    assert mixtral_run("verify", "--load", str(own_checkpoint)).returncode == 0
    damaged = mixtral_run("verify", "--load", str(own_checkpoint), "--proof")
    assert damaged.returncode == 4
    assert "quantised-fp8/layer_00.safetensors: layers.0.experts." in damaged.stderr
    assert "convert --overwrite" not in damaged.stderr
    edit_record(own_checkpoint, STALE["another base"])
    stale = mixtral_run("verify", "--load", str(own_checkpoint), "--proof")
    assert stale.returncode == 0
    assert "quantised-fp8 is not used" in stale.stdout


def test_verify_of_an_hf_model_reads_its_quantized_cache(own_hf_model: Path) -> None:
    start(own_hf_model)
    whole = mixtral_run("verify", "--load", str(own_hf_model))
    assert "quantised-fp8: every byte is what was written" in whole.stdout, whole.stderr
    wipe_experts(own_hf_model)
    other = mixtral_run("verify", "--load", str(own_hf_model))
    assert other.returncode == 4
    assert "quantised-fp8: made of a base with fingerprint" in other.stderr
