"""Ctrl-C during a generation keeps the tokens so far."""

import json
import os
import signal
from pathlib import Path

import pytest

from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.inference import continuation
from mixtral_run.inference import generate as generation
from mixtral_run.launch.stop_request import StopRequest


def test_the_texts_so_far_are_printed_and_written(
    small_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopRequest, "ended_a_run", False)
    choose, passes = continuation.choose, []

    def interrupted(*arguments: object) -> object:
        passes.append(None)
        if len(passes) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(continuation, "choose", interrupted)
    file = tmp_path / "answers.json"
    config = GenerateConfig(
        load=small_checkpoint, prompt=("Once", "A second"), max_new_tokens=100, output_file=file, device="cpu",
        tensor_model_parallel_size=1, expert_model_parallel_size=1,
    )  # fmt: skip
    generation.generate(config)
    assert len(passes) == 3
    answers = json.loads(file.read_text())
    assert [answer["prompt"] for answer in answers] == ["Once", "A second"]
    assert max(answer["num_tokens"] for answer in answers) == 3
    assert not all(answer["finished"] for answer in answers)
    assert "Stopped as requested" in "".join(capsys.readouterr())
    assert StopRequest.ended_a_run
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
