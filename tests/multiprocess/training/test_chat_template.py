"""The chat template of a model, from its tokenizer through training into generation."""

import json
from pathlib import Path

from mixtral_run.weights.manifest.describe import describe_adapter
from tests.multiprocess.conftest import mixtral_run

ONE = ("--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "1", "--nproc-per-node", "1")
CPU = ("--device", "cpu")
TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_a_model_is_trained_and_asked_in_its_own_form(own_hf_model: Path, tmp_path: Path) -> None:
    settings = json.loads((own_hf_model / "tokenizer_config.json").read_text())
    (own_hf_model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TEMPLATE}))
    data, adapter = tmp_path / "my.jsonl", tmp_path / "adapter"
    data.write_text('{"instruction": "a", "response": "b"}\n')
    words = ("--load", str(own_hf_model), *ONE, *CPU)
    iterations = ("--train-iters", "1", "--seq-length", "32", "--global-batch-size", "1")
    done = mixtral_run("finetune", *words, "--data-path", str(data), "--save", str(adapter), *iterations)
    assert done.returncode == 0, done.stderr
    assert "Chat template: the tokenizer's own\n" in done.stdout
    # `b</s>` is learned; Mixtral-Instruct's form has the blank before `b` in it as well.
    assert "(2 count in the loss)" in done.stdout
    record = describe_adapter(adapter).chat_template
    assert record is not None and (record.name, record.text) == ("tokenizer", TEMPLATE)

    # The base's tokenizer has another template by now.
    (own_hf_model / "tokenizer_config.json").write_text(json.dumps(settings))
    ask = ("--adapter", str(adapter), "--instruction", "a", "--max-new-tokens", "1")
    done = mixtral_run("generate", *words, *ask)
    assert done.returncode == 0, done.stderr
    assert "Chat template: the tokenizer's own; learned is what it adds" in done.stdout
    assert "was trained with another chat template than the tokenizer of the base has" in done.stdout + done.stderr


def test_a_template_that_the_data_do_not_fit_ends_the_run_in_words(own_hf_model: Path, tmp_path: Path) -> None:
    data, file = tmp_path / "my.jsonl", tmp_path / "mine.jinja"
    data.write_text('{"instruction": "a", "response": "b"}\n' * 2)
    file.write_text(TEMPLATE.replace("</s>", ""))
    words = ("--load", str(own_hf_model), "--data-path", str(data), "--save", str(tmp_path / "adapter"), *ONE, *CPU)
    more = ("--train-iters", "1", "--seq-length", "32", "--global-batch-size", "1", "--chat-template")
    done = mixtral_run("finetune", *words, *more, str(file))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("would not learn to stop") == 2 and "line 2" in done.stderr
    done = mixtral_run("finetune", *words, *more, str(tmp_path / "none.jinja"))
    assert done.returncode == 2 and f"--chat-template {tmp_path / 'none.jinja'}" in done.stderr
    assert "Loading" not in done.stdout
