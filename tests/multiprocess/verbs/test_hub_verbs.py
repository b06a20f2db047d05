"""A hub name where the other verbs take an HF directory: downloaded once, by the process that the user called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from mixtral_run.errors import CheckFailed, ConfigError, WeightsError
from tests.multiprocess.conftest import fresh_mixtral_run, mixtral_run
from tests.support.servers.hub_server import COMMIT, NAME, Hub, client_environment, serving

Call = Callable[..., CompletedProcess[str]]
RUN = ("--mock-data", "--seq-length", "32", "--global-batch-size", "2", "--train-iters", "1", "--device", "cpu")
TWO = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--nproc-per-node", "2")


@pytest.fixture
def hub(tmp_path: Path, small_hf_model: Path) -> Iterator[Hub]:
    shutil.copytree(small_hf_model, tmp_path / "served")
    with serving(tmp_path / "served") as server:
        yield server


@pytest.fixture
def call(hub: Hub, tmp_path: Path) -> Call:
    def called(*words: object, **environment: str) -> CompletedProcess[str]:
        return mixtral_run(*map(str, words), **(client_environment(hub, tmp_path) | environment))

    return called


def shards(hub: Hub) -> list[str]:
    return sorted(name for name in hub.sent if name.endswith(".safetensors"))


def test_from_the_hub_to_an_adapter_that_names_it(hub: Hub, call: Call, tmp_path: Path) -> None:
    def fresh(*words: object, **environment: str) -> CompletedProcess[str]:
        """Once for each verb, which then does all of its own imports somewhere."""
        return fresh_mixtral_run(*map(str, words), **(client_environment(hub, tmp_path) | environment))

    adapter = tmp_path / "adapter"
    tuned = fresh("finetune", "--load", NAME, "--save", adapter, "--lora-rank", "2", *RUN, *TWO)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    assert f"bytes of {NAME} into {tmp_path / 'hf-home' / 'hub'}" in tuned.stdout
    assert shards(hub) == sorted(file.name for file in hub.folder.glob("*.safetensors"))
    hub.sent.clear()

    answered = fresh(
        "generate", "--load", NAME, "--adapter", adapter, *TWO, "--device", "cpu", "--prompt", "Once",
        "--max-new-tokens", "2", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr

    plain = call("export", "--adapter", adapter, "--output-path", tmp_path / "peft")
    assert plain.returncode == 0, plain.stderr
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, COMMIT)

    named = call("export", "--adapter", adapter, "--hf-model-path", NAME, "--output-path", tmp_path / "named")
    assert named.returncode == 0, named.stderr
    config = json.loads((tmp_path / "named" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, None)

    merged = fresh(
        "export", "--adapter", adapter, "--hf-model-path", NAME, "--merge", "--output-path", tmp_path / "merged"
    )
    assert merged.returncode == 0, merged.stderr
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) == len(list(hub.folder.glob("*.safetensors")))
    assert shards(hub) == []


def test_verify_takes_a_name_on_both_sides(hub: Hub, call: Call, small_checkpoint: Path) -> None:
    compared = call("verify", "--load", small_checkpoint, "--against", NAME, "--device", "cpu", "--json")
    assert compared.returncode == 0, compared.stderr
    assert json.loads(compared.stdout)["comparison"]["differences"] == []
    assert "logits against HF" in compared.stderr
    reported = call("verify", "--load", NAME, "--json")
    assert reported.returncode == 0, reported.stderr
    assert json.loads(reported.stdout)["kind"] == "hf"
    assert shards(hub) == sorted(file.name for file in hub.folder.glob("*.safetensors"))


@pytest.mark.parametrize("against", ["checkpoint", "HF directory"])
def test_another_model_is_not_downloaded_to_be_compared(
    hub: Hub, call: Call, small_checkpoint: Path, small_hf_model: Path, against: str
) -> None:
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"rope_theta": 12345.0}))
    load = small_checkpoint if against == "checkpoint" else small_hf_model
    reported = call("verify", "--load", load, "--against", NAME, "--device", "cpu", "--json")
    assert reported.returncode == CheckFailed.exit_code, reported.stderr
    assert json.loads(reported.stdout)["ok"] is False
    assert "rotary_base: the checkpoint has" in reported.stderr and "the HF model 12345.0" in reported.stderr
    assert shards(hub) == []


@pytest.mark.parametrize("verb", [("verify", "--load"), ("convert", "--output-path", "new", "--hf-model-path")])
def test_a_folder_that_was_moved_aside_is_no_name_on_the_hub(
    hub: Hub, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / ".base.replaced").mkdir(parents=True)
    reported = call(*verb, "runs/base", PYTHONPATH=str(Path(__file__).parents[3]))
    assert reported.returncode == WeightsError.exit_code, reported.stderr
    assert "mv runs/.base.replaced runs/base" in reported.stderr
    assert hub.tokens == set()


def test_the_plan_and_the_way_back_need_no_weights(
    hub: Hub, call: Call, small_checkpoint: Path, tmp_path: Path
) -> None:
    planned = call("plan", "--load", NAME, "--gpus", "1", "--json")
    assert planned.returncode == 0, planned.stderr
    back = call(
        "convert", "--from-megatron", small_checkpoint, "--hf-model-path", NAME, "--output-path", tmp_path / "hf"
    )
    assert back.returncode == 0, back.stderr
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (hub.folder / "tokenizer.json").read_bytes()
    assert shards(hub) == []


THREE = ("--tensor-model-parallel-size", "3", "--expert-model-parallel-size", "3", "--nproc-per-node", "3")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("finetune", "--save", "adapter", *RUN, *TWO, "--micro-batch-size", "4"), "--global-batch-size"),
        (("finetune", "--save", "served", *RUN, *TWO), "--save"),
        (("pretrain", *RUN, *TWO, "--nproc-per-node", "3"), "does not fit 3 processes"),
        (("generate", "--prompt", "a", "--device", "cpu", *THREE), "does not divide the model's 8 experts"),
    ],
)
def test_what_needs_no_weights_is_found_before_they_are_downloaded(
    hub: Hub, call: Call, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    values = [str(tmp_path / word) if word in ("adapter", "served") else word for word in words]
    done = call(*values, "--load", NAME)
    assert done.returncode == ConfigError.exit_code, done.stdout + done.stderr
    assert said in done.stderr
    assert shards(hub) == []


def test_a_folder_of_that_name_comes_first_and_one_that_is_not_there_is_said(
    hub: Hub, call: Call, small_hf_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_hf_model, tmp_path / NAME)
    verified = call("verify", "--load", NAME, "--json", PYTHONPATH=str(Path(__file__).parents[3]))
    assert verified.returncode == 0, verified.stderr
    assert hub.tokens == set()
    hub.state = "missing"
    gone = call("generate", "--load", "runs/mixtral", "--prompt", "a", PYTHONPATH=str(Path(__file__).parents[3]))
    assert gone.returncode == WeightsError.exit_code
    assert "no folder of that name here" in gone.stderr
