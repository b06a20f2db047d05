"""Steps that `up` skips: only those of an adapter with the same data and settings, and of a target that it wrote."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from mixtral_run.config.verbs.training import UpConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.up import Done, _check_same_base, _check_same_training, _check_target, _finetune_config

HOST = parse_host("gpu-01")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "my.jsonl"
    file.write_text('{"instruction": "a", "response": "b"}\n')
    return file


def done(config: UpConfig, data: Path) -> Done:
    return Done(True, 10, True, {
        "training": config.to_mapping(), "data_sha256": hashlib.sha256(data.read_bytes()).hexdigest(),
    })  # fmt: skip


def test_the_same_run_is_done_and_a_longer_one_goes_on(data: Path) -> None:
    before = done(UpConfig(data_path=(str(data),)), data)
    _check_same_training(HOST, UpConfig(data_path=(str(data),)), before)
    _check_same_training(HOST, UpConfig(data_path=(str(data),), train_iters=20), before)
    _check_same_training(HOST, UpConfig(data_path=("/data/on the host.jsonl",)), before)
    _check_same_training(HOST, UpConfig(data_path=(str(data),)), Done(False, 0, False, {}))


def test_a_run_that_began_continues_and_the_first_one_takes_no_other_folder(data: Path) -> None:
    config = UpConfig(data_path=(str(data),))
    assert _finetune_config(config, done(config, data)).resume == "auto"
    assert _finetune_config(config, Done(True, 0, False, {})).resume is None


def test_another_file_or_setting_is_reported(data: Path) -> None:
    before = done(UpConfig(data_path=(str(data),)), data)
    data.write_text('{"instruction": "a", "response": "other"}\n')
    with pytest.raises(ConfigError) as caught:
        _check_same_training(HOST, UpConfig(data_path=(str(data),), lora_rank=8, seq_length=1024), before)
    text = str(caught.value)
    assert "trained on another file" in text
    assert "--lora-rank: the adapter was trained with 16; found 8" in text
    assert "--seq-length: the adapter was trained with 512; found 1024" in text
    assert "gpu-01: /checkpoints/adapter, iteration 10" in text


def test_a_setting_that_an_earlier_record_lacks_had_its_default(data: Path) -> None:
    config = UpConfig(data_path=(str(data),))
    earlier = config.to_mapping()
    del earlier["attention_precision"], earlier["base_precision"], earlier["lora_scaling"]
    before = Done(True, 10, True, {"training": earlier})
    _check_same_training(HOST, config, before)
    with pytest.raises(ConfigError) as caught:
        _check_same_training(HOST, dataclasses.replace(config, attention_precision="fp8", base_precision="nf4"), before)
    assert caught.value.problems == (
        "--base-precision: the adapter was trained with bf16; found nf4",
        "--attention-precision: the adapter was trained with bf16; found fp8",
    )


def test_another_base_is_reported(data: Path) -> None:
    before = done(UpConfig(data_path=(str(data),)), data)
    record = {"source": "/models/mine", "fingerprint": "quick-whole"}
    same = dataclasses.replace(before, base=record, adapter={**before.adapter, "base": {"fingerprint": "quick-whole"}})
    for model in ("/models/mine", UpConfig.hf_model_path):
        config = UpConfig(data_path=(str(data),), hf_model_path=model)
        _check_same_base(HOST, config, same)
        _check_same_training(HOST, config, same)
    with pytest.raises(ConfigError, match="--hf-model-path /models/mine"):
        _check_same_base(HOST, UpConfig(data_path=(str(data),), hf_model_path="/models/other"), same)
    other = dataclasses.replace(same, base={**record, "fingerprint": "quick-other"})
    with pytest.raises(ConfigError, match="--load: the adapter was trained on another base than mixtral"):
        _check_same_training(HOST, UpConfig(data_path=(str(data),)), other)


def test_a_folder_of_somebody_else_is_reported_before_the_work(tmp_path: Path) -> None:
    _check_target(tmp_path / "new")
    with pytest.raises(ConfigError, match="cannot be written here"):
        _check_target(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    _check_target(tmp_path)
