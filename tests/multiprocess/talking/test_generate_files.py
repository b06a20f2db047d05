"""`generate --prompts FILE --output FILE`: answers as HF's, Ctrl-C, and a second run that continues."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.answers import AnswersFile
from mixtral_run.inference.generate import generate
from mixtral_run.launch.stop_request import StopRequest
from mixtral_run.model.kernels.quantized.quantized_mm import dequantize, quantize_to
from mixtral_run.terminal.report import Report
from mixtral_run.weights.quantized_cache import layout
from tests.multiprocess.conftest import SMALL

LINES = (
    {"instruction": "Name a state of matter."},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                  {"role": "user", "content": "And now?"}]},
    {"text": "Once upon a time"},
    {"question": "Warum grüßt man?", "answer": "Nur so."},
)  # fmt: skip
RENDERED = (
    "<s>[INST] Name a state of matter. [/INST]", "<s>[INST] Hi [/INST] Hello</s>[INST] And now? [/INST]",
    "<s>Once upon a time", "<s>[INST] Warum grüßt man? [/INST]",
)  # fmt: skip


def config(checkpoint: Path, folder: Path, **changes: Any) -> GenerateConfig:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    settings: dict[str, Any] = {
        "load": checkpoint, "prompts": prompts, "output": folder / "answers.jsonl", "max_new_tokens": 6,
        "batch_size": 2, "device": "cpu", "tensor_model_parallel_size": 1, "expert_model_parallel_size": 1,
    }  # fmt: skip
    return GenerateConfig(**(settings | changes))


def answers(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(small_hf_model: Path) -> list[str]:
    """HF's own greedy answers, each prompt alone, rendered by hand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_hf_model)
    model = AutoModelForCausalLM.from_pretrained(small_hf_model, dtype=torch.float32)
    found = []
    for text in RENDERED:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        new = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        found.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return found


def test_answers_are_hfs_and_a_second_run_adds_nothing(
    small_checkpoint: Path, tmp_path: Path, expected: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(small_checkpoint, tmp_path)
    generate(settings)
    assert settings.output is not None
    found = answers(settings.output)
    assert [each["text"] for each in found] == expected
    assert [each["index"] for each in found] == [0, 1, 2, 3]
    assert [each["prompt"] for each in found][1:3] == ["And now?", "Once upon a time"]
    before = settings.output.read_bytes()
    capsys.readouterr()
    generate(settings)
    assert settings.output.read_bytes() == before
    assert "All 4 prompts are answered" in capsys.readouterr().out


def test_ctrl_c_keeps_complete_answers_and_the_next_run_goes_on(
    small_checkpoint: Path, tmp_path: Path, expected: Sequence[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(StopRequest, "ended_a_run", False)
    settings = config(small_checkpoint, tmp_path)
    assert settings.output is not None
    write = AnswersFile.write

    def interrupted(file: AnswersFile, number: int, answer: Any) -> None:
        write(file, number, answer)
        if number == 1:
            os.kill(os.getpid(), signal.SIGINT)

    advanced: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(AnswersFile, "write", interrupted)
        patched.setattr(Report, "progress", lambda *_: nullcontext(SimpleNamespace(advance=advanced.append)))
        generate(settings)
    assert sum(advanced) <= 2, "the answers that were stopped are not finished work"
    assert [each["index"] for each in answers(settings.output)] == [0, 1]
    assert "2 of 4 answers are complete" in capsys.readouterr().out
    # A kill may cut the last line off.
    with settings.output.open("ab") as file:
        file.write(b'{"index": 2, "pro')
    StopRequest.ended_a_run = False
    generate(settings)
    assert [each["text"] for each in answers(settings.output)] == expected


@pytest.mark.parametrize("what", ["other settings", "other prompts", "fewer prompts", "no answers"])
def test_a_file_that_is_not_of_this_run_is_refused(small_checkpoint: Path, tmp_path: Path, what: str) -> None:
    settings = config(small_checkpoint, tmp_path)
    output = settings.output
    assert output is not None and settings.prompts is not None
    generate(settings)
    changed = {
        "other settings": lambda: config(small_checkpoint, tmp_path, max_new_tokens=5),
        "other prompts": lambda: settings,
        "fewer prompts": lambda: settings,
        "no answers": lambda: settings,
    }[what]()
    if what == "other prompts":
        settings.prompts.write_text(settings.prompts.read_text().replace("a state", "no state"))
    elif what == "fewer prompts":
        settings.prompts.write_text("".join(settings.prompts.read_text().splitlines(keepends=True)[:2]))
    elif what == "no answers":
        output.write_text("notes of mine\n")
    before = output.read_bytes()
    with pytest.raises(ConfigError, match="does not belong to this run"):
        generate(changed)
    assert output.read_bytes() == before


def test_a_terminal_gets_tokens_as_they_come(
    small_checkpoint: Path, tmp_path: Path, expected: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal:
        parts: ClassVar[list[str]] = []

        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> None:
            self.parts.append(text)

        def flush(self) -> None:
            pass

    monkeypatch.setattr(sys, "stdout", Terminal())
    generate(config(small_checkpoint, tmp_path, output=None))
    shown = "".join(Terminal.parts)
    prompts = ("Name a state of matter.", "And now?", "Once upon a time", "Warum grüßt man?")
    for prompt, text in zip(prompts, expected, strict=True):
        # Control characters of a model's answer do not reach the terminal.
        harmless = re.sub("[\x00-\x08\x0b-\x1f\x7f]", "\ufffd", text)
        assert f"\n> {prompt}\n{harmless}\n" in shown
    begin = next(number for number, part in enumerate(Terminal.parts) if "Name a state" in part)
    end = next(number for number, part in enumerate(Terminal.parts) if "And now?" in part)
    assert end - begin > 2, "the first answer came in several parts"


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
def test_a_quantized_base_answers_as_its_dequantized_weights_do(
    small_hf_model: Path, tmp_path: Path, precision: str
) -> None:
    """The weights' numbers after quantizing, written as an HF model of full precision, give the same answers."""
    loud, rounded = tmp_path / "loud", tmp_path / "rounded"
    shutil.copytree(small_hf_model, loud)
    for file in loud.glob("*.safetensors"):
        # Of experts as small as those of the random model the answers hardly depend.
        weights = {name: each * (20 if ".experts." in name else 1) for name, each in load_file(file).items()}
        save_file(weights, file, {"format": "pt"})
    shutil.copytree(loud, rounded)
    changed = 0
    for file in rounded.glob("*.safetensors"):
        weights = load_file(file)
        for name in (each for each in weights if ".experts." in each):
            weights[name] = dequantize(*quantize_to(weights[name], precision), torch.float32)
            changed += 1
        save_file(weights, file, {"format": "pt"})
    assert changed == 3 * SMALL.num_experts * SMALL.num_layers
    found = {}
    stored: dict[str, Any] = {"base_precision": precision}
    kinds: tuple[tuple[str, Path, dict[str, Any]], ...] = (
        ("whole", rounded, {}), ("stored", loud, stored), ("plain", loud, {}),
    )  # fmt: skip
    for name, load, flags in kinds:
        folder = tmp_path / name
        folder.mkdir()
        settings = config(load, folder, max_new_tokens=24, **flags)
        generate(settings)
        assert settings.output is not None
        found[name] = [(each["text"], each["num_tokens"]) for each in answers(settings.output)]
    assert found["stored"] == found["whole"]
    assert found["stored"] != found["plain"]
    assert not layout.cache_folder(loud, precision).exists()
    for other in (
        config(loud, tmp_path / "stored", max_new_tokens=24),
        config(loud, tmp_path / "whole", max_new_tokens=24),
    ):
        # Another precision; and other weights of the same form.
        with pytest.raises(ConfigError, match="does not belong to this run"):
            generate(other)
