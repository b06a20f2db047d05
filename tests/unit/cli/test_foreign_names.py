"""Flags and verbs of other programs get the kit's own; suggestions never come from a first letter."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import VERBS, root
from mixtral_run.config.names.foreign_names import FOREIGN_FLAGS
from mixtral_run.config.names.foreign_verbs import FOREIGN_VERBS
from mixtral_run.errors import ConfigError


def problems(*words: str) -> tuple[str, ...]:
    error = CliRunner().invoke(root, list(words)).exception
    assert isinstance(error, ConfigError), error
    return error.problems


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--learning-rate", "write --lr"),
        ("--learning_rate", "write --lr"),
        ("--output-dir", "write --save"),
        ("--model", "write --load"),
        ("--model_name_or_path", "write --load"),
        ("--dataset", "write --data-path"),
        ("--max-steps", "write --train-iters"),
        ("--per_device_train_batch_size", "write --micro-batch-size"),
        ("--gradient_accumulation_steps", "micro batch size × accumulation steps × data-parallel processes"),
        ("--bf16", "write --dtype (with the value bf16"),
        ("--lora-r", "write --lora-rank"),
        ("--load-in-4bit", "write --base-precision (with the value nf4)"),
        ("--deepspeed", "leave it out: the kit splits the model"),
        ("--target-modules", "linear_qkv (q_proj, k_proj, v_proj)"),
        ("--gradient_checkpointing", "write --recompute (with the value full)"),
        ("--recompute-num-layers", "write --recompute-layers (counted from the first"),
        ("--pipeline_model_parallel_size", "leave it out"),
        ("--optim", "leave it out: finetune always uses AdamW"),
        ("--train-on-inputs", "leave it out: only the answers are learned"),
        ("--adapter", "qlora: --base-precision nf4"),
        ("--save-total-limit", "write --keep-last"),
        ("--lora-modules-to-save", "--train-also"),
        ("--use-dora", "DoRA is not there"),
        ("--use-rslora", "--lora-scaling"),
        ("--init-lora-weights", "--init-lora"),
        ("--moe-aux-loss-coeff", "--router-aux-loss"),
        ("--saves-per-epoch", "write --save-interval"),
        ("--wandb_project", "WANDB_"),
        ("--report_to", "write --log-to (with wandb or mlflow"),
        ("--wandb-name", "write --run-name"),
        ("--logging-dir", "SAVE/tensorboard and SAVE/metrics.jsonl"),
    ],
)
def test_a_foreign_flag_of_finetune_is_answered(flag: str, answer: str) -> None:
    (line,) = [each for each in problems("finetune", flag, "x") if "no such flag" in each]
    assert line.startswith(flag.replace("_", "-") + ": there is no such flag; ")
    assert answer in line


def test_epochs_are_answered_with_what_the_verb_has() -> None:
    (line,) = [each for each in problems("finetune", "--num-train-epochs", "3") if "no such flag" in each]
    assert "write --epochs" in line or "iterations are examples × epochs / --global-batch-size" in line


def test_the_answer_depends_on_the_verb() -> None:
    assert any("write --output-path" in each for each in problems("convert", "--output-dir", "x"))
    assert any("write --hf-model-path" in each for each in problems("convert", "--model", "x"))
    assert "--learning-rate: there is no such flag; the kit calls it --lr, which this verb does not have" in problems(
        "convert", "--learning-rate", "1"
    )
    assert any("write --max-new-tokens" in each for each in problems("generate", "--max-tokens", "5"))


@pytest.mark.parametrize(
    ("word", "command"),
    [
        ("train", "mixtral-run finetune"), ("sft", "mixtral-run finetune"), ("merge", "mixtral-run export"),
        ("merge_lora", "mixtral-run export"), ("Inference", "mixtral-run generate"), ("ps", "mixtral-run jobs"),
        ("check", "mixtral-run data check FILE"), ("preprocess", "mixtral-run data check FILE"),
        ("dpo", "mixtral-run align --method dpo, kto, orpo or simpo, which learns from preferences"),
        ("grpo", "mixtral-run align, which learns from preferences; training with a reward model is not offered"),
    ],
)  # fmt: skip
def test_a_foreign_verb_is_answered(word: str, command: str) -> None:
    error = CliRunner().invoke(root, [word]).exception
    assert isinstance(error, ConfigError)
    assert error.next_command is not None and error.next_command.startswith(command)
    assert error.expected is None  # The list of all verbs would only hide the one that is meant.


def test_a_verb_without_json_says_so() -> None:
    """`--on`, which is near by its letters, would start the job on another machine."""
    assert problems("export", "--json")[0] == "--json: there is no such flag; this verb prints no JSON"


def test_a_config_file_without_its_flag_is_answered() -> None:
    error = CliRunner().invoke(root, ["train", "x.yml"]).exception
    assert isinstance(error, ConfigError) and error.next_command == "mixtral-run finetune --config x.yml"
    assert problems("finetune", "run.toml") == ("'run.toml': a flag before it is missing; write --config run.toml",)


def test_a_setting_for_which_a_foreign_flag_was_given_is_not_missing_as_well() -> None:
    assert problems("finetune", "--load", "org/model", "--mock-data", "--output-dir", "o") == (
        "--output-dir: there is no such flag; write --save",
    )
    assert not any("required" in each for each in problems("convert", "--model", "o/m", "--output-path", "o"))
    for words in (("h", "--model", "m", "--bogus", "b"), ("--model", "m", "h")):
        found = problems("up", *words, "--output-dir", "o", "--dataset", "d")
        assert all("there is no such flag" in each for each in found), found
    found = problems("finetune", "--model", "o/m", "--data", "d.jsonl")
    assert [each.split()[0] for each in found if "is required" in each] == ["--save"]


def test_the_base_of_a_merge_is_named_when_it_is_missing(tmp_path: Path) -> None:
    words = ("export", "--merge", "--adapter", str(tmp_path), "--output-path", str(tmp_path / "out"))
    needed = "--hf-model-path is required: --merge needs the HF model of the adapter's base"
    assert problems(*words) == (needed,)
    (line,) = problems(*words, "--load", "m")
    assert (
        line == "--load: there is no such flag; write --hf-model-path (an HF model's directory or its name on the hub)"
    )


def test_the_name_that_another_verb_has_for_the_base_is_answered() -> None:
    for words, name in ((("convert", "--load", "m"), "hf-model-path"), (("finetune", "--hf-model-path", "m"), "load")):
        found = problems(*words)
        assert any(f"{words[1]}: there is no such flag; write --{name} (" in each for each in found), found
        assert not any(each.startswith(f"--{name} is required") for each in found), found


def test_a_file_for_another_program_is_answered_by_keys(tmp_path: Path) -> None:
    file = tmp_path / "axolotl.yml"
    file.write_text(
        "base_model: m\noptimizer: adamw\nadapter: qlora\noutput_dir: o\nmicro_batch_size: two\n"
        "datasets: [{path: a, type: alpaca}]\n"
    )
    found = problems("finetune", "--config", str(file), "--seed", "x")
    assert found[0].startswith("unknown setting 'base_model'; write 'load' (")
    assert found[1:] == (
        "unknown setting 'optimizer'; leave it out: finetune always uses AdamW",
        "unknown setting 'adapter'; leave it out: finetune always trains LoRA adapters (qlora: 'base_precision' nf4); "
        "an adapter to start from is 'init_adapter'",
        "unknown setting 'output_dir'; write 'save'",
        "unknown setting 'datasets'; write 'data_path' (a list of paths; what Axolotl calls type is 'data_format')",
        "--seed: expected a whole number; found 'x'",
        "micro_batch_size: expected a whole number; found 'two'",
    )


def test_data_check_takes_the_flag_of_finetune(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n')
    shown = CliRunner().invoke(root, ["data", "check", "--data-path", str(tmp_path / "a.jsonl")])
    assert (shown.exit_code, "1 example" in shown.output) == (0, True), shown.output
    found = problems("data", "check", str(tmp_path / "a.jsonl"), "--eval-interval", "2")
    assert found == ("--eval-interval: there is no such flag",)


def test_a_flag_of_another_verb_is_answered_with_this_verbs_own() -> None:
    assert problems("convert", "--save", "x")[0] == "--save: there is no such flag; write --output-path"
    assert problems("evaluate", "--save", "x")[0] == "--save: there is no such flag; write --output-file"
    assert problems("export", "--load", "x")[0].startswith("--load: there is no such flag; write --hf-model-path (")
    assert problems("generate", "--hf-model-path", "x")[0].startswith(
        "--hf-model-path: there is no such flag; write --l"
    )
    assert problems("verify", "--output-path", "x")[0].endswith("leave it out: other verbs have it, this one does not")


def test_every_answer_names_what_exists() -> None:
    for command in FOREIGN_VERBS.values():
        assert command.split()[0] == "mixtral-run"
        assert command.split()[1].strip(",") in {*VERBS, "--help"}
    assert not set(FOREIGN_VERBS) & set(VERBS)
    # --epochs, --warmup-ratio and the like may not exist in every version; each of them has a flag to fall back on.
    flags: set[str] = set()
    for verb in VERBS:
        found = root.get_command(click.Context(root), verb)
        assert found is not None
        flags |= {name.lstrip("-") for each in found.params for name in each.opts}
    optional = {"data-format", "chat-template"}
    for name, foreign in FOREIGN_FLAGS.items():
        assert foreign.meant or foreign.note, name
        assert not foreign.meant or {setting for setting, _ in foreign.meant} & (flags | optional), name


@pytest.mark.parametrize("verb", ["finetune", "convert", "generate", "plan", "export"])
def test_no_suggestion_shares_only_its_first_letter(verb: str) -> None:
    for letter in "abcdefghijklmnopqrstuvwxyz":
        for flag in (f"-{letter}", f"--{letter}", f"--{letter}qx", f"--{letter}-zzqq-jj"):
            for line in problems(verb, flag, "1") if flag != "-h" else ():
                assert not (line.startswith(f"{flag}:") and "did you mean" in line), line


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--lerning-rate", "; if --learning-rate is meant, write --lr"),
        ("--ouput_dir", "; if --output-dir is meant, write --save"),
        ("--zzz-qqq", ""),
    ],
)
def test_a_misspelled_name_of_another_program_is_answered(flag: str, answer: str, tmp_path: Path) -> None:
    line = next(each for each in problems("finetune", flag, "x") if "there is no such flag" in each)
    assert line == flag.replace("_", "-") + ": there is no such flag" + answer
    file = tmp_path / "c.yaml"
    file.write_text(f"{flag[2:]}: x\n")
    line = next(each for each in problems("finetune", "--config", str(file)) if "unknown setting" in each)
    assert ("is meant, write '" in line) is bool(answer)
