"""Data and models that people bring: nothing wrong is learned in silence, and errors come before any weight is read."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixtral_run.errors import WeightsError
from tests.multiprocess.conftest import SMALL, environment_of, mixtral_run

RUN = ("--train-iters", "1", "--seq-length", "32", "--global-batch-size", "2", "--device", "cpu")
EXAMPLE = '{"instruction": "What is the capital of Australia?", "response": "Canberra."}\n'


def give_token_of_its_own(model: Path, role: str) -> None:
    """Add a token to the tokenizer whose id is the model's vocab_size. role: eos_token, or none for a plain token."""
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    added = {"id": SMALL.vocab_size, "content": "Canberra", "special": role != "none", "normalized": False}
    tokenizer["added_tokens"].append({"single_word": False, "lstrip": False, "rstrip": False, **added})
    file.write_text(json.dumps(tokenizer))
    if role != "none":
        settings = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps({**settings, role: "Canberra"}))


@pytest.mark.parametrize("role", ["eos_token", "none"])
@pytest.mark.parametrize("tp", [1, 2])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    own_hf_model: Path, tmp_path: Path, tp: int, role: str
) -> None:
    """Split by TP, an embedding would take such an id for padding and train wrong without a word."""
    give_token_of_its_own(own_hf_model, role)
    data = tmp_path / "my.jsonl"
    data.write_text(EXAMPLE)
    layout = ("--tensor-model-parallel-size", str(tp), "--expert-model-parallel-size", "1", "--nproc-per-node", str(tp))
    words = ("--load", str(own_hf_model), *layout)
    done = mixtral_run("finetune", *words, "--data-path", str(data), "--save", str(tmp_path / "adapter"), *RUN)
    assert done.returncode == WeightsError.exit_code, done.stderr
    assert done.stderr.count("The tokenizer has tokens that the model lacks.") == 1
    assert f"'Canberra' has id {SMALL.vocab_size}; the model's ids end at {SMALL.vocab_size - 1}" in done.stderr
    assert "Loading" not in done.stdout and not (tmp_path / "adapter").exists()
    done = mixtral_run("generate", *words, "--prompt", "Canberra is", "--max-new-tokens", "2", "--device", "cpu")
    assert done.returncode == WeightsError.exit_code and f"has id {SMALL.vocab_size}" in done.stderr


def test_data_of_many_forms_are_trained_on_with_their_shares(small_checkpoint: Path, tmp_path: Path) -> None:
    """A table, a compressed list and standard input in one run; what is left out and not used is reported."""
    (temporary := tmp_path / "temporary").mkdir()
    (tmp_path / "a.csv").write_text("question,answer,id\nWhat is 2 + 2?,4,x\nWhat is 3 + 3?,6,y\n,7,z\n")
    chat = [{"from": "human", "value": "Name a fish."}, {"from": "gpt", "value": "Cod."}]
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(json.dumps([{"conversations": chat}], indent=1).encode()))
    words = ("--load", str(small_checkpoint), "--save", str(tmp_path / "adapter"), *RUN, "--nproc-per-node", "2")
    layout = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--skip-bad-examples")
    sources = ("--data-path", f"{tmp_path / 'a.csv'}:0.5", "--data-path", f"{tmp_path / 'b.json.gz'}:0.25")
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_run", "finetune", *words, *layout, *sources, "--data-path", "-:0.25"],
        input=EXAMPLE, capture_output=True, text=True, env=environment_of(TMPDIR=str(temporary)), check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 examples" in done.stdout
    assert "1 example left out, as not usable: line 4 of a.csv: the keys fit no shape: 'answer', 'id'" in done.stdout
    assert "'id' (2)" in done.stdout
    assert re.search(r"a\.csv:0\.5: 2 examples, 50\.0% of the samples, each 1\.0 times", done.stdout)
    assert not list(temporary.iterdir())
