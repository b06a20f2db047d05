"""Tokenization in the chat format of Mixtral-Instruct: `<s>[INST] instruction [/INST] response</s>`, and
`[INST] …` again for each further turn.

Training and generation share it, so that prompts are tokenized as in training.
Source: the chat template in tokenizer_config.json of mistralai/Mixtral-8x7B-Instruct-v0.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixtral_run.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the HF tokenizer in `folder`: a checkpoint's `tokenizer/` or an HF model's folder. Never asks the hub.

    Raises WeightsError if there is none, it cannot be read, or it lacks <s> or </s>.
    """
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise WeightsError(
            "There is no tokenizer.",
            where=str(folder),
            expected=" or ".join(names),
            found="no such folder" if not folder.is_dir() else "neither",
            next_command="mixtral-run convert copies it next to the weights; convert again, or copy the HF model's "
            "tokenizer files there",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # transformers and tokenizers raise plain Exception, among others, on broken files.
        raise WeightsError("The tokenizer cannot be read.", where=str(folder), found=_first_line(error)) from error
    missing = [
        name
        for name, number in (("bos_token", tokenizer.bos_token_id), ("eos_token", tokenizer.eos_token_id))
        if number is None
    ]
    if missing:
        raise WeightsError(
            "The tokenizer lacks a token for the begin or the end of a text.",
            where=str(folder),
            expected="bos_token and eos_token, as Mixtral's has",
            found=f"no {' and no '.join(missing)}",
        )
    return tokenizer


def check_token_ids(
    tokenizer: PreTrainedTokenizerBase, highest_id: int, vocab_size: int, folder: Path, where: str | None = None
) -> None:
    """Raise WeightsError if the model has no row for a token id. An embedding split by TP would not notice it.

    Args:
        tokenizer: its begin and end of text are checked, which every row contains.
        highest_id: the highest id of the encoded texts.
        vocab_size: rows of the model's embedding.
        folder: of the tokenizer.
        where: the file of the texts.
    """
    used = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token")}
    problems = [
        f"{name} {getattr(tokenizer, name)!r} has id {number:,}; the model's ids end at {vocab_size - 1:,}"
        for name, number in used.items()
        if number >= vocab_size
    ]
    if highest_id >= vocab_size and highest_id not in used.values():
        token = tokenizer.convert_ids_to_tokens(highest_id)
        text = f"token {token!r} has id {highest_id:,}; the model's ids end at {vocab_size - 1:,}"
        problems.append(f"{where}: {text}" if where else text)
    if problems:
        raise WeightsError(
            "The tokenizer has tokens that the model lacks.",
            where=str(folder),
            problems=problems,
            expected=f"ids below {vocab_size:,}, the model's vocab_size",
            found=f"a tokenizer of {len(tokenizer):,} tokens",
            next_command="give the base the tokenizer that it was trained with; or resize the HF model's embeddings to "
            "the tokenizer (resize_token_embeddings) and convert it again",
        )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """Return the ids of `<s>[INST] instruction [/INST]`, the prompt in training and generation."""
    return [_special(tokenizer, "bos_token_id"), *_encode(tokenizer, prompt_text(instruction))]


def encode_turn(tokenizer: PreTrainedTokenizerBase, instruction: str, response: str) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, and those of the response with </s>. Concatenated they are the whole row.

    The response is encoded together with the prompt, because SentencePiece and byte-level tokenizers treat the space
    before it differently.
    """
    prompt = _encode(tokenizer, prompt_text(instruction))
    # The blanks at its beginning are learned: they may be the indentation of code.
    response = response.rstrip()
    row = _encode(tokenizer, f"{prompt_text(instruction)} {response}")
    # If a tokenizer merges across the end of the prompt, no generation could produce that token; then the response is
    # encoded by itself. Neither Mixtral's tokenizer nor the kit's does so.
    answer = row[len(prompt) :] if row[: len(prompt)] == prompt else _encode(tokenizer, response)
    return [_special(tokenizer, "bos_token_id"), *prompt], [*answer, _special(tokenizer, "eos_token_id")]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Return `encode_turn` of each turn of a conversation. Concatenated they are the whole row, with one <s>."""
    encoded = [encode_turn(tokenizer, instruction, response) for instruction, response in turns]
    return [(prompt[1:] if number else prompt, answer) for number, (prompt, answer) in enumerate(encoded)]


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of `<s>text</s>`, for continued pre-training."""
    return [_special(tokenizer, "bos_token_id"), *_encode(tokenizer, text), _special(tokenizer, "eos_token_id")]


def prompt_text(instruction: str) -> str:
    """Return the prompt without <s>: `[INST] instruction [/INST]`."""
    return f"[INST] {instruction.strip()} [/INST]"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # split_special_tokens: a "</s>" within a text is plain text, not the end-of-sequence token.
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def _special(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    number = getattr(tokenizer, name)
    if not isinstance(number, int):
        raise ConfigError("The tokenizer lacks a special token.", expected=name, found=repr(number))
    return number


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
