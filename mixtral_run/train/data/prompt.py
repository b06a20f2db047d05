"""Text → tokens in the form that Mixtral-Instruct was trained on: `<s>[INST] instruction [/INST] response</s>`, and
`[INST] …` again for each further turn.

Training and generation share this, so that what is asked is tokenized as it was learned.
Source of the form: the chat template in tokenizer_config.json of mistralai/Mixtral-8x7B-Instruct-v0.1.
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
    """The HF tokenizer in `folder`: a checkpoint's `tokenizer/`, or a HF model's own folder. Never asks the hub.

    Raises WeightsError when there is none, it cannot be read, or it lacks <s> or </s>.
    """
    names = ("tokenizer.json", "tokenizer.model")
    if not any((folder / name).is_file() for name in names):
        raise WeightsError(
            "There is no tokenizer.",
            where=str(folder),
            expected=" or ".join(names),
            found="no such folder" if not folder.is_dir() else "neither",
            next_command="mixtral-run convert copies it beside the weights; convert again, or copy the HF model's "
            "tokenizer files there",
        )
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        # transformers and tokenizers raise plain Exception on broken files, and much else.
        raise WeightsError("The tokenizer cannot be read.", where=str(folder), found=_first_line(error)) from error
    missing = [
        name
        for name, number in (("bos_token", tokenizer.bos_token_id), ("eos_token", tokenizer.eos_token_id))
        if number is None
    ]
    if missing:
        raise WeightsError(
            "The tokenizer has no mark for where a text begins or ends.",
            where=str(folder),
            expected="bos_token and eos_token, as Mixtral's has",
            found=f"no {' and no '.join(missing)}",
        )
    return tokenizer


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, instruction: str) -> list[int]:
    """The ids of `<s>[INST] instruction [/INST]`: what training puts before a response, and generation continues."""
    return [_special(tokenizer, "bos_token_id"), *_encode(tokenizer, prompt_text(instruction))]


def encode_turn(tokenizer: PreTrainedTokenizerBase, instruction: str, response: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and ids of the response with </s>. One after the other they are the whole row.

    The response is encoded behind the prompt, so that its first token is the one that text has there (a SentencePiece
    tokenizer and a byte-level one treat the space before it differently).
    """
    prompt = _encode(tokenizer, prompt_text(instruction))
    row = _encode(tokenizer, f"{prompt_text(instruction)} {response.strip()}")
    # A tokenizer that merges across the end of the prompt would teach tokens that no generation starts from; then the
    # response is encoded by itself. Neither Mixtral's nor ours does.
    answer = row[len(prompt) :] if row[: len(prompt)] == prompt else _encode(tokenizer, response.strip())
    return [_special(tokenizer, "bos_token_id"), *prompt], [*answer, _special(tokenizer, "eos_token_id")]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """`encode_pair` of each turn of a conversation; one after the other they are the whole row, with one <s>."""
    encoded = [encode_turn(tokenizer, instruction, response) for instruction, response in turns]
    return [(prompt[1:] if number else prompt, answer) for number, (prompt, answer) in enumerate(encoded)]


def prompt_text(instruction: str) -> str:
    """The prompt without <s>: `[INST] instruction [/INST]`."""
    return f"[INST] {instruction.strip()} [/INST]"


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # split_special_tokens: a "</s>" that somebody wrote in a text is text, not the end of it.
    encoded: Any = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return list(encoded["input_ids"])


def _special(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    number = getattr(tokenizer, name)
    if not isinstance(number, int):
        raise ConfigError("The tokenizer lacks a special token.", expected=name, found=repr(number))
    return number


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
