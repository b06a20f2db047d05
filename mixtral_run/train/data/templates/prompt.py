"""Loading of tokenizers, and their check against the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.tokenizer_files import readable_tokenizer

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
        with readable_tokenizer(folder) as readable:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(readable), local_files_only=True)
        tokenizer.name_or_path = str(folder)
    except WeightsError:
        raise
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


def prompt_text(instruction: str) -> str:
    """Return the prompt without <s>: `[INST] instruction [/INST]`."""
    return f"[INST] {instruction.strip()} [/INST]"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
