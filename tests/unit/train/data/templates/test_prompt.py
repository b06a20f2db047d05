"""Tokenization: the same prompt in training and generation with any tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.train.data.templates.prompt import check_token_ids, load_tokenizer
from mixtral_run.trial.sizes import INSTRUCTIONS
from tests.support.examples import examples_of, turns_of
from tests.support.samples import encode_conversation, encode_turn, prompt_tokens

BOS, EOS = 1, 2
TEXTS = [turns_of(example)[0] for example in examples_of(INSTRUCTIONS)] + [
    ("日本の首都は?", "東京です。"),
    ("a </s> b [INST]", "</s>"),
    ("Indent", "\n    x = 1"),
    ("]", "]"),
]


@pytest.fixture(params=["tiny_tokenizer", "llama_like_tokenizer"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def test_the_prompt_of_generation_is_the_prompt_of_training(tokenizer: Any) -> None:
    for instruction, response in TEXTS:
        prompt, _ = encode_turn(tokenizer, instruction, response)
        assert prompt == prompt_tokens(tokenizer, instruction)
        assert prompt[0] == BOS
        assert prompt.count(BOS) == 1
        assert EOS not in prompt


def test_the_row_reads_as_the_instruct_form(tokenizer: Any) -> None:
    for instruction, response in TEXTS:
        prompt, answer = encode_turn(tokenizer, instruction, response)
        assert tokenizer.decode(prompt[1:]).strip() == f"[INST] {instruction} [/INST]"
        assert tokenizer.decode(answer[:-1]).strip() == response.strip()
        assert tokenizer.decode(prompt[1:] + answer[:-1]).strip() == f"[INST] {instruction} [/INST] {response.rstrip()}"


def test_only_the_end_of_the_response_is_an_end_of_sequence(tokenizer: Any) -> None:
    for instruction, response in TEXTS:
        _, answer = encode_turn(tokenizer, instruction, response)
        assert answer[-1] == EOS
        assert EOS not in answer[:-1]


def test_the_row_is_the_tokenization_of_the_whole_text(tokenizer: Any) -> None:
    for instruction, response in TEXTS[:50]:
        prompt, answer = encode_turn(tokenizer, instruction, response)
        whole = tokenizer(f"[INST] {instruction} [/INST] {response}", add_special_tokens=False)["input_ids"]
        assert prompt[1:] + answer[:-1] == whole


def test_a_conversation_is_its_turns_behind_one_beginning(tokenizer: Any) -> None:
    turns = TEXTS[:3]
    parts = encode_conversation(tokenizer, turns)
    row = [token for prompt, answer in parts for token in (*prompt, *answer)]
    assert row.count(BOS) == 1 and row[0] == BOS and row.count(EOS) == 3
    for number, ((prompt, answer), turn) in enumerate(zip(parts, turns, strict=True)):
        alone, expected = encode_turn(tokenizer, *turn)
        assert answer == expected and prompt == (alone if number == 0 else alone[1:])


def test_a_tokenizer_that_merges_across_the_boundary_still_keeps_the_prompt_whole() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *"[INST]/ abc56"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(letters))}
    vocabulary |= {"] ": len(vocabulary)}
    core = Tokenizer(models.BPE(vocabulary, [("]", " ")], unk_token="<unk>"))
    hostile = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    merged = hostile("[INST] a [/INST] 56", add_special_tokens=False)["input_ids"]
    assert merged[-3] == vocabulary["] "], "the stand-in no longer merges across the boundary"

    prompt, answer = encode_turn(hostile, "a", "56")
    assert prompt == prompt_tokens(hostile, "a")
    assert hostile.convert_ids_to_tokens(answer) == ["5", "6", "</s>"]


def test_a_missing_tokenizer_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such folder") as caught:
        load_tokenizer(tmp_path / "tokenizer")
    assert str(tmp_path / "tokenizer") in str(caught.value)
    with pytest.raises(WeightsError, match="neither"):
        load_tokenizer(tmp_path)


def test_a_broken_tokenizer_file_is_an_error_of_ours(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_folder, folder)
    content = (folder / "tokenizer.json").read_text("utf-8")
    (folder / "tokenizer.json").write_text(content[: len(content) // 2], "utf-8")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_tokenizer(folder)


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path: Path, tiny_tokenizer_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    shutil.copytree(tiny_tokenizer_folder, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}', "utf-8")
    with pytest.raises(WeightsError, match="no eos_token"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("highest_id", "vocab_size", "words"),
    [
        (0, 2, ["eos_token '</s>' has id 2; the model's ids end at 1"]),
        (400, 400, ["my.jsonl: token ", "has id 400; the model's ids end at 399"]),
        (400, 2, ["eos_token '</s>'", "has id 400"]),
    ],
)
def test_ids_that_the_model_lacks_are_refused(
    tiny_tokenizer: Any, tmp_path: Path, highest_id: int, vocab_size: int, words: list[str]
) -> None:
    check_token_ids(tiny_tokenizer, highest_id, 401, tmp_path)
    with pytest.raises(WeightsError) as caught:
        check_token_ids(tiny_tokenizer, highest_id, vocab_size, tmp_path, "my.jsonl")
    assert all(word in str(caught.value) for word in words), str(caught.value)
