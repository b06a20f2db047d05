"""`serve --prove URL`: a server that computes with HF's models, `transformers serve`, and broken servers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.errors import CheckFailed, ConfigError, HostError
from mixtral_run.inference.prove import _readings, check_proof, prove
from mixtral_run.inference.session import open_session
from tests.multiprocess.conftest import mixtral_run
from tests.multiprocess.talking.conftest import Adapted, Oracle, rendered

COUNT = 6
PROMPTS = ("Name a color.", "Was heißt das?", "Count.")
ONE: dict[str, Any] = {"device": "cpu", "tensor_model_parallel_size": 1, "expert_model_parallel_size": 1}
Answer = Callable[[dict[str, Any]], tuple[int, object]]


@contextmanager
def server(answer: Answer, models: object) -> Iterator[str]:
    """STAND-IN for an engine: OpenAI's API over HTTP. answer: status and document for a request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, models)

        def do_POST(self) -> None:
            self._send(*answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def _send(self, status: int, document: object) -> None:
            data = document if isinstance(document, bytes) else json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()


def greedy_ids(oracle: Oracle, ids: list[int], count: int) -> list[int]:
    import torch

    new = oracle.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(each) for each in new[0, len(ids) :]]


def engine(models: dict[str, Oracle], *, takes_ids: bool, changed: bool = False) -> Answer:
    """The greedy completions of HF's models. changed: one token of one answer is another."""

    def answer(request: dict[str, Any]) -> tuple[int, object]:
        assert request["temperature"] == 0
        oracle, prompt = models[request["model"]], request["prompt"]
        if not takes_ids and not isinstance(prompt, str):
            return 400, {"error": "prompt must be a string"}
        ids = prompt if takes_ids else oracle.tokenizer(prompt).input_ids
        tokens = greedy_ids(oracle, ids, request["max_tokens"])
        if changed and ids == oracle.tokenizer(rendered([(PROMPTS[1], None)]), add_special_tokens=False).input_ids:
            tokens[3] = tokens[3] % 100 + 40
        text = oracle.tokenizer.decode(tokens, skip_special_tokens=True)
        return 200, {"choices": [{"text": text} | ({"token_ids": tokens} if takes_ids else {})]}

    return answer


def second_choice(models: dict[str, Oracle], *, shift: float = 0.0) -> tuple[Answer, float]:
    """A server that takes the second best token once, goes on from there, and reports log probabilities. All by HF.

    shift: error of its log probabilities. Returns the server, and by how much the second token's logit is smaller.
    """
    import torch

    at = 2
    differences: list[float] = []

    def logits(oracle: Oracle, ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            return oracle.model(torch.tensor([ids])).logits[0]

    def answer(request: dict[str, Any]) -> tuple[int, object]:
        oracle, ids, count = models[request["model"]], request["prompt"], request["max_tokens"]
        before = greedy_ids(oracle, ids, at)
        best = logits(oracle, ids + before)[-1].topk(2)
        differences.append(float(best.values[0] - best.values[1]))
        tokens = [*before, int(best.indices[1])]
        tokens += greedy_ids(oracle, ids + tokens, count - len(tokens))
        rows = logits(oracle, ids + tokens)[len(ids) - 1 : -1].log_softmax(-1)
        found = [float(row[token]) + shift for row, token in zip(rows, tokens, strict=True)]
        text = oracle.tokenizer.decode(tokens, skip_special_tokens=True)
        choice = {"text": text, "finish_reason": "length", "token_ids": tokens, "logprobs": {"token_logprobs": found}}
        return 200, {"choices": [choice]}

    ids = models["base"].tokenizer(rendered([(PROMPTS[0], None)]), add_special_tokens=False).input_ids
    answer({"model": "base", "prompt": ids, "max_tokens": COUNT})
    return answer, differences[0]


def config(adapted: Adapted, url: str, **changes: Any) -> ServeConfig:
    settings: dict[str, Any] = {
        "load": adapted.base, "adapter": adapted.adapter, "prove": url, "instruction": PROMPTS, "max_new_tokens": COUNT,
    }  # fmt: skip
    return ServeConfig(**(settings | ONE | changes)).check()


def models_of(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name} for name in names]}


def test_a_server_of_the_same_models_passes_on_two_ranks(adapted: Adapted) -> None:
    served = {"base": adapted.hf, "adapter": adapted.merged}
    with server(engine(served, takes_ids=True), models_of("base", "adapter")) as url:
        done = mixtral_run(
            "serve", "--prove", url, "--load", str(adapted.base), "--adapter", str(adapted.adapter), "--device", "cpu",
            "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--max-new-tokens", str(COUNT),
            *(word for prompt in PROMPTS for word in ("--instruction", prompt)),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "answers as generate does: 6 answers" in done.stdout


def test_a_server_of_the_same_models_that_takes_texts_passes(
    adapted: Adapted, capsys: pytest.CaptureFixture[str]
) -> None:
    served = {"base": adapted.hf, "adapter": adapted.merged}
    with server(engine(served, takes_ids=False), models_of("base", "adapter")) as url:
        check_proof(config(adapted, url, nproc_per_node=1))
        prove(config(adapted, url))
    assert "answers as generate does: 6 answers" in capsys.readouterr().out


@pytest.mark.parametrize("takes_ids", [True, False])
def test_the_prompt_and_the_place_of_a_difference_are_named(adapted: Adapted, takes_ids: bool) -> None:
    served = {"base": adapted.hf, "adapter": adapted.merged}
    answer = engine(served, takes_ids=takes_ids, changed=True)
    with server(answer, models_of("base", "adapter")) as url, pytest.raises(CheckFailed) as caught:
        prove(config(adapted, url))
    assert len(caught.value.problems) == 2
    for name, problem in zip(("base", "adapter"), caught.value.problems, strict=True):
        assert problem.startswith(f"{name}: prompt 'Was heißt das?': ")
        assert ("token 4: generate has" if takes_ids else "character ") in problem


def test_an_adapter_that_is_not_loaded_is_found(adapted: Adapted) -> None:
    """The most repeated fault: the server answers as the base under the adapter's name."""
    answer = engine({"base": adapted.hf, "adapter": adapted.hf}, takes_ids=True)
    with server(answer, models_of("base", "adapter")) as url, pytest.raises(CheckFailed) as caught:
        prove(config(adapted, url))
    assert all(problem.startswith("adapter: ") for problem in caught.value.problems)
    assert len(caught.value.problems) == len(PROMPTS)


def test_a_token_that_is_equally_good_is_reported_and_passes(
    adapted: Adapted, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, difference = second_choice({"base": adapted.hf})
    settings = {"adapter": None, "instruction": PROMPTS[:1]}
    with server(answer, models_of("base")) as url:
        prove(config(adapted, url, **settings, logits_tolerance=difference + 1e-4))
        shown = " ".join(capsys.readouterr().out.split())
        assert "0 of 1 answers are equal" in shown and "1 of them up to tokens that are equally good" in shown
        assert f"the logits differ by {difference:.2g}" in shown
        assert "log probabilities differ by at most" in shown
        with pytest.raises(CheckFailed) as caught:
            prove(config(adapted, url, **settings, logits_tolerance=difference - 1e-4))
    (problem,) = caught.value.problems
    assert "token 3: generate has" in problem and f"the logits differ by {difference:.2g}" in problem


def test_the_tokens_of_an_answer_that_is_known_as_text(adapted: Adapted) -> None:
    """With and without the blank that Mixtral's template puts before an answer; not of a part of a character."""
    session = open_session(config(adapted, "http://127.0.0.1"))
    tokenizer = adapted.hf.tokenizer
    row = tokenizer(rendered([("Count.", None)]), add_special_tokens=False).input_ids
    whole = tokenizer(rendered([("Count.", None)]) + " one two", add_special_tokens=False).input_ids
    assert whole[: len(row)] == row
    for text in (" one two", "one two"):
        assert tuple(whole[len(row) :]) in _readings(text, row, session)
    assert _readings("one \ufffd", row, session) == []


def test_log_probabilities_of_another_model_are_found_in_equal_answers(adapted: Adapted) -> None:
    answer, difference = second_choice({"base": adapted.hf}, shift=0.75)
    settings = {"adapter": None, "instruction": PROMPTS[:1], "logits_tolerance": difference + 0.5}
    assert difference < 0.2, "the tolerance must lie between both"
    with server(answer, models_of("base")) as url, pytest.raises(CheckFailed) as caught:
        prove(config(adapted, url, **settings))
    (problem,) = caught.value.problems
    assert "token 1: the log probability is" in problem


@pytest.mark.parametrize(
    ("status", "document", "found"),
    [
        (500, {"error": "EngineCore encountered an issue"}, "HTTP 500"),
        (200, b"<html>hello</html>", "a JSON object"),
        (200, {"choices": []}, "choices[0].text"),
        (200, [1], "a JSON object"),
        (401, {"error": "no key"}, "HTTP 401"),
    ],
)
def test_broken_servers_are_reported_in_words(adapted: Adapted, status: int, document: object, found: str) -> None:
    with server(lambda _: (status, document), models_of("base", "adapter")) as url, pytest.raises(HostError) as caught:
        prove(config(adapted, url, instruction=("Hi",)))
    assert found in str(caught.value)


def test_dead_servers_and_unknown_names_before_a_model_is_loaded(adapted: Adapted) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    done = mixtral_run(
        "serve", "--prove", url, "--load", str(adapted.base), "--device", "cpu", "--nproc-per-node", "1",
        "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1",
    )  # fmt: skip
    assert done.returncode == HostError.exit_code
    assert "The server does not answer." in done.stderr and "Traceback" not in done.stderr
    with (
        server(lambda _: (500, {}), models_of("base")) as url,
        pytest.raises(ConfigError, match="no model of that name"),
    ):
        check_proof(config(adapted, url, nproc_per_node=1))
    # A server that lists nothing may answer all the same, as `transformers serve` does.
    with server(lambda _: (500, {}), models_of()) as url:
        check_proof(config(adapted, url, nproc_per_node=1))


@pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "openai", "uvicorn")),
    reason="transformers serve needs more packages: pip install 'transformers[serving]'",
)
def test_a_real_server_of_the_merged_model(adapted: Adapted, tmp_path: Path) -> None:
    """`transformers serve` of the weights that were merged by hand, under the name of its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "hub").mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    words = ["serve", "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words, str(adapted.merged.folder)], env=environment, stdout=log, stderr=log
        )
    try:
        until = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < until:
            try:
                urllib.request.build_opener().open(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.3)
        assert process.poll() is None, (tmp_path / "log").read_text()
        name = str(adapted.merged.folder)
        settings = config(adapted, f"http://127.0.0.1:{port}", base_name="", adapter_name=name)
        prove(settings)
        with pytest.raises(CheckFailed):
            prove(config(adapted, f"http://127.0.0.1:{port}/v1", adapter=None, base_name=name))
    finally:
        process.terminate()
        process.wait(30)
