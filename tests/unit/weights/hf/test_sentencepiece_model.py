"""tokenizer.model without tokenizer.json: the ids are those of SentencePiece, which mistral-common calls."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from mixtral_run.errors import WeightsError
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.weights.hf.tokenizer_files import readable_tokenizer, tokenizer_problems
from tests.support.references.model_cases import write_model, write_sentencepiece

TEXTS = (
    "",
    " ",
    "Hello world",
    "  two  spaces ",
    "[INST] Hi [/INST] a",
    "naïve 日本語 😀\n\tx = 1",
    "a</s>b<s>",
    "\x00½ﬁ",
)


def ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return found


def of_mistral_common(name: str) -> Path:
    import mistral_common

    return Path(str(mistral_common.__file__)).parent / "data" / name


def only_the_model(folder: Path) -> Path:
    """A model's folder with tokenizer.model in place of tokenizer.json, and the class that people's configs name."""
    write_model(folder)
    (folder / "tokenizer.json").unlink()
    write_sentencepiece(folder / "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer"}))
    return folder


@pytest.mark.parametrize("name", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"])
def test_the_ids_are_those_of_mistral_common(tmp_path: Path, name: str) -> None:
    """On the tokenizer of Mixtral 8x7B (v1) and on one with many control tokens (v2), with all kinds of characters."""
    import mistral_common
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    file = Path(str(mistral_common.__file__)).parent / "data" / name
    shutil.copyfile(file, tmp_path / "tokenizer.model")
    theirs = SentencePieceTokenizer(file)
    ours = load_tokenizer(tmp_path)
    assert (len(ours), ours.bos_token_id, ours.eos_token_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    assert ours.name_or_path == str(tmp_path)
    draw = random.Random(0)
    words = [*TEXTS, *["The", "quick", "brown", "fox", "é日😀", "\n\t", "", "x=1;", "#ß"], "  ", "<unk>", "▁", "\u200b"]
    texts = [*TEXTS, *("".join(draw.choice([" ", ""]) + draw.choice(words) for _ in range(40)) for _ in range(300))]
    texts += ["".join(chr(draw.randrange(1, 0x3000)) for _ in range(60)) for _ in range(200)]
    for text in texts:
        assert ids(ours, text) == theirs.encode(text, bos=False, eos=False), text
    assert ours.decode(ours("Hello  wörld 😀")["input_ids"], skip_special_tokens=True) == "Hello  wörld 😀"


def test_the_same_tokens_as_with_tokenizer_json(tmp_path: Path) -> None:
    plain = load_tokenizer(write_model(tmp_path / "plain"))
    folder = only_the_model(tmp_path / "model")
    assert tokenizer_problems(folder) == []
    made = load_tokenizer(folder)
    theirs = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in TEXTS:
        assert ids(made, text) == ids(plain, text) == theirs.encode(text), text
    assert made("ab")["input_ids"] == plain("ab")["input_ids"]  # <s> before it
    assert sorted(file.name for file in folder.glob("tokenizer*")) == ["tokenizer.model", "tokenizer_config.json"]


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    folder = only_the_model(tmp_path / "model")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 101}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {"100": {"content": "<|im_start|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "eos_token": "<|im_end|>"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "</s>"]) == [100, 101, 2]
    assert tokenizer.eos_token_id == 101
    for wrong in ({"<|im_end|>": 97}, {"<|im_end|>": 102}, {"a": 101, "<|im_end|>": 101}):
        (folder / "added_tokens.json").write_text(json.dumps(wrong))
        (problem,) = tokenizer_problems(folder)
        assert "the ids of added tokens do not follow the model's 100" in problem


def test_a_folder_with_tokenizer_json_is_read_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    write_sentencepiece(folder / "tokenizer.model", model_type=1)
    with readable_tokenizer(folder) as readable:
        assert readable == folder
    assert tokenizer_problems(folder) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": 1}, "a byte-pair model"),
        ({"dummy_prefix": 0}, "a space before a text"),
        ({"unknown_type": 4}, "no pieces of type 4"),
        (None, "not a SentencePiece model"),
    ],
)
def test_models_of_another_kind_are_refused_before_the_weights_are_copied(
    tmp_path: Path, changes: dict[str, int] | None, said: str
) -> None:
    folder = only_the_model(tmp_path / "model")
    if changes is None:
        (folder / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        write_sentencepiece(folder / "tokenizer.model", **changes)
    (problem,) = tokenizer_problems(folder)
    assert said in problem and "tokenizer.json --local-dir" in problem
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(folder)
    assert said in str(caught.value.found) and "hf download MODEL tokenizer.json" in str(caught.value.next_command)


def test_a_model_with_symbols_of_its_own_is_refused(tmp_path: Path) -> None:
    """The one of Mixtral 8x22B Instruct (v3) has symbols that a text may contain: tokenizer.json has no such thing."""
    shutil.copyfile(of_mistral_common("mistral_instruct_tokenizer_240323.model.v3"), tmp_path / "tokenizer.model")
    (problem,) = tokenizer_problems(tmp_path)
    assert "no pieces of type 4" in problem
