"""The tokenizer's files next to the weights: their names, and copying them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.sentencepiece_model import NotReadableError, tokenizer_json

JSON_NAME, MODEL_NAME, CONFIG_NAME = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"

CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
"""File of the default chat template, and folder of those for other purposes, such as tool_use."""
TOKENIZER_FILES = (
    JSON_NAME,
    MODEL_NAME,
    CONFIG_NAME,
    "special_tokens_map.json",
    "added_tokens.json",
    CHAT_TEMPLATE,
    "chat_template.json",
    "merges.txt",
    "vocab.json",
    "config.json",
    "generation_config.json",
)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy those of the tokenizer's files and the two configs that exist; return their names."""
    target.mkdir(parents=True, exist_ok=True)
    found = tokenizer_files(source)
    for name in found:
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    return found


def tokenizer_problems(source: Path) -> list[str]:
    """Return a line for each file that this user may not read or the kit cannot; checked before weights are copied."""
    problems = [
        f"{source / name}: cannot be read by this user"
        for name in tokenizer_files(source)
        if not os.access(source / name, os.R_OK)
    ]
    if not problems and (source / MODEL_NAME).is_file() and not (source / JSON_NAME).is_file():
        try:
            _made_json(source)
        except WeightsError as error:
            problems.append(f"{error.where}: {error.found}; {error.next_command}")
    return problems


@contextmanager
def readable_tokenizer(folder: Path) -> Iterator[Path]:
    """Yield a folder from which transformers reads the tokenizer in `folder` without SentencePiece.

    Where tokenizer.json is missing it is made from tokenizer.model, in a folder that lasts as long as the context.
    Raises WeightsError if that cannot be done exactly.
    """
    if (folder / JSON_NAME).is_file() or not (folder / MODEL_NAME).is_file():
        yield folder
        return
    content = _made_json(folder)
    with TemporaryDirectory(prefix="mixtral-run-tokenizer-") as made:
        target = Path(made)
        for name in tokenizer_files(folder):
            if name not in (MODEL_NAME, "config.json", "generation_config.json", "added_tokens.json"):
                (target / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(folder / name, target / name)
        (target / JSON_NAME).write_text(json.dumps(content), encoding="utf-8")
        # The class would make a tokenizer of its own from the vocabulary.
        settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **_json_object(folder / CONFIG_NAME)}
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (target / CONFIG_NAME).write_text(json.dumps(settings), encoding="utf-8")
        yield target


def _made_json(folder: Path) -> dict[str, Any]:
    added: dict[str, int] = {}
    try:
        for text, number in _json_object(folder / "added_tokens.json").items():
            added[text] = int(number)
        for number, token in _json_object(folder / CONFIG_NAME).get("added_tokens_decoder", {}).items():
            added[token["content"]] = int(number)
        return tokenizer_json(folder / MODEL_NAME, added)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise WeightsError(
            "There is only a tokenizer.model, of which no tokenizer.json can be made.",
            where=str(folder / MODEL_NAME),
            expected="a byte-pair model of SentencePiece as Mistral AI's, or a tokenizer.json next to it",
            found=str(error) if isinstance(error, NotReadableError) else f"{type(error).__name__}: {error}",
            next_command=f"hf download MODEL tokenizer.json --local-dir {folder}, with the model's name on the hub",
        ) from error


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise NotReadableError(f"{path.name} is not a JSON object")
    return values


def tokenizer_files(source: Path) -> list[str]:
    """Return the names of the tokenizer's files in a folder, relative to it, and those of the two configs."""
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    return found + sorted(f"{MORE_TEMPLATES}/{path.name}" for path in (source / MORE_TEMPLATES).glob("*.jinja"))
