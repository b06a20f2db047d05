"""--config with YAML, TOML and JSON; `config init`; problems of settings and inputs in one error."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from mixtral_run.cli.config_file import read_config_file
from mixtral_run.cli.config_template import CONFIGS
from mixtral_run.cli.main import root
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError

WANTED = {"load": "base", "lr": 1e-4, "lora_rank": 8, "quantized_cache": "yes", "mock_data": True, "data_path": None}


def refusal(*words: str) -> ConfigError:
    error = CliRunner().invoke(root, list(words)).exception
    assert isinstance(error, ConfigError), error
    return error


@pytest.mark.parametrize(
    ("name", "text"),
    [
        # PyYAML by itself reads 1e-4 as a text and yes as true.
        ("a.yaml", "load: base\nlr: 1e-4\nlora-rank: 8\nquantized_cache: yes\nmock_data: true\ndata_path:\n"),
        ("a.yml", "---\n{load: base, lr: 1.0E-4, lora_rank: 8, quantized_cache: 'yes', mock_data: True, data_path: ~}"),
        ("a.json", json.dumps(WANTED)),
        ("a.conf", "\ufeff" + json.dumps(WANTED)),
        (
            "a",
            "# a comment\nload: base\nlr: .0001\nlora_rank: +8\nquantized_cache: yes\nmock_data: TRUE\ndata_path: null",
        ),
    ],
)
def test_every_format_gives_the_same_settings(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    assert read_config_file(file) == WANTED


def test_toml_gives_the_same_settings(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('load = "base"\nlr = 1e-4\nlora-rank = 8\nquantized_cache = "yes"\nmock_data = true\n')
    assert read_config_file(file) == {name: value for name, value in WANTED.items() if value is not None}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "load: a\nsave: b\nload: c\n", "'load' is set twice, in lines 1 and 3"),
        ("a.yaml", "lora_rank: 1\nlora-rank: 1\n", "sets a name twice"),
        ("a.toml", 'load = "a"\nload = "b"\n', "line 2"),
        ("a.json", '{"load": "a", "load": "b"}', "'load' is set twice"),
        ("a.yaml", "load: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("a.yaml", "a: &a [x]\nb: *a\n", "anchors and aliases are not supported"),
        ("a.yaml", "load: a\n---\nload: b\n", "expected a single document"),
        ("a.yaml", "- load\n", "list"),
        ("a.yaml", "? [a, b]\n: c\n", "expected a name"),
        ("a.yaml", "load: [\n", "line 2"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.yaml", "load: " + "[" * 3_000, "nested too deeply"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_config_file(file)
    assert words in str(caught.value)
    assert caught.value.where == str(file)


def test_unknown_keys_are_refused_with_the_known_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("lora_rnk: 8\nlearning_rate: 1e-4\nnum_train_epochs: 1\nqqq: 1\ndeepspeed: x\n")
    problems = refusal("finetune", "--config", str(file)).problems
    assert "unknown setting 'lora_rnk'; did you mean 'lora_rank'?" in problems
    assert "unknown setting 'learning_rate'; write 'lr'" in problems
    assert any(each.startswith("unknown setting 'num_train_epochs'; write '") for each in problems)
    assert "unknown setting 'qqq'" in problems
    assert any(each.startswith("unknown setting 'deepspeed'; leave it out") for each in problems)


def test_wrong_flags_values_and_missing_inputs_are_one_error(tmp_path: Path) -> None:
    error = refusal(
        "finetune", "--load", "nowhere", "--data-path", str(tmp_path / "missing.jsonl"), "--lora-rank", "two",
        "--trian-iters", "3", "--save", str(tmp_path / "s"), "--keep-best",
    )  # fmt: skip
    assert error.exit_code == 2
    assert list(error.problems) == [
        "--trian-iters: there is no such flag; did you mean --train-iters or --lr-warmup-iters?",
        "--lora-rank: expected a whole number; found 'two'",
        "--keep-best: expected --keep-last N with it; found none, so that all checkpoints stay",
        "--keep-best: expected --valid-data-path or --valid-fraction, whose loss decides; found neither",
        f"--data-path {tmp_path / 'missing.jsonl'}: expected a file; found nothing of that name",
        "--load nowhere: expected a folder; found nothing of that name",
    ]


def test_contents_of_inputs_are_in_the_error_of_the_settings(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"instruction": "a"}\n')
    (tmp_path / "good.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    words = ("finetune", "--load", str(tmp_path / "model"), "--valid-data-path", str(tmp_path / "good.jsonl"))
    error = refusal(*words, "--data-path", str(tmp_path / "bad.jsonl"), "--seq-length", "12o")
    assert error.exit_code == 2
    settings, model, data = error.problems
    assert "--seq-length: expected a whole number" in settings and "--save is required" in settings
    assert "model_type: expected 'mixtral'; found None" in model
    assert f"where:    --data-path {tmp_path / 'bad.jsonl'}" in data and "'response'" in data
    # Data that take long to read are not read for it.
    with (tmp_path / "bad.jsonl").open("r+") as stream:
        stream.truncate(2**27)
    assert len(refusal(*words, "--data-path", str(tmp_path / "bad.jsonl"), "--seq-length", "12o").problems) == 2


@pytest.mark.parametrize(
    "words",
    [
        ("finetune", "--on", "gpu-01", "--load", "nowhere", "--bogus"),
        ("generate", "--load", "mistralai/Mixtral-8x7B-v0.1", "--bogus"),
        ("smoke", "--load", "new", "--bogus"),
    ],
)
def test_inputs_that_are_elsewhere_or_yet_to_be_made_are_not_missed(words: tuple[str, ...]) -> None:
    assert not any("nothing of that name" in each for each in refusal(*words).problems)


@pytest.mark.parametrize("verb", CONFIGS)
def test_config_init_writes_every_setting_with_its_default(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    shown = CliRunner().invoke(root, ["config", "init", verb])
    assert CliRunner().invoke(root, ["config", "init", verb, "-o", str(file)]).exit_code == 0
    assert file.read_text() == shown.output
    config_class = CONFIGS[verb]
    fields = {item.name: item for item in dataclasses.fields(config_class) if not item.metadata["hidden"]}
    # By YAML's own rules as well as by the kit's, with every comment mark in front of a setting removed.
    names = tuple(f"# {name}: " for name in fields)
    lines = [line[2:] if line.startswith(names) else line for line in shown.output.splitlines()]
    plain: dict[str, Any] = yaml.safe_load("\n".join(lines))
    file.write_text("\n".join(lines))
    assert plain == read_config_file(file)
    assert set(plain) == set(fields)
    for name, item in fields.items():
        if item.default is dataclasses.MISSING:
            assert plain[name] is None
            assert f"\n{name}:\n" in shown.output
        else:
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            assert plain[name] == (str(default) if isinstance(default, Path) else default)


def test_config_init_never_overwrites(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    assert "never overwritten" in str(refusal("config", "init", "-o", str(file)))
    assert file.read_text() == "mine"
    assert "mkdir -p" in str(refusal("config", "init", "-o", str(tmp_path / "none" / "run.yaml")))
    assert "did you mean finetune?" in str(refusal("config", "int", "finetne"))


def test_required_settings_without_a_value_are_missing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("load:\nmock_data: true\n")
    problems = refusal("finetune", "--config", str(file)).problems
    assert [each.split(":")[0] for each in problems] == ["--load is required", "--save is required"]
    with pytest.raises(ConfigError):
        FinetuneConfig.from_mapping({"load": "a", "save": None})


@pytest.mark.parametrize("verb", CONFIGS)
def test_what_config_init_says_to_fill_in_is_all_that_a_verb_needs(verb: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    said = CliRunner().invoke(root, ["config", "init", verb, "-o", str(file)]).output
    named = re.search(r"next: fill in (.*), then mixtral-run", said)
    fill_in = re.split(", | and ", named[1]) if named else []
    values = dict.fromkeys(fill_in, "x") | ({"method": "dpo"} if "method" in fill_in else {})
    lists = {"data_path", "prompt"}
    config_class = CONFIGS[verb]
    config_class.from_mapping({name: [text] if name in lists else text for name, text in values.items()}).check()
    for name in fill_in:
        with pytest.raises(ConfigError):
            config_class.from_mapping({key: text for key, text in values.items() if key != name}).check()
    assert said.endswith(f"mixtral-run {verb}{' USER@HOST' if verb == 'up' else ''} --config {file}\n")
