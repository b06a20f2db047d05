"""A small byte-level BPE tokenizer, trained on given texts, in the file layout of a released Mixtral.

The ids of <unk>, <s> and </s> are 0, 1 and 2, as in Mixtral's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
NUM_BYTES = 256
MINIMUM_VOCAB_SIZE = len(SPECIAL_TOKENS) + NUM_BYTES


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """Train a `tokenizers.Tokenizer` with at most `vocab_size` entries that encodes any text without loss.

    Every byte has an entry, so that unseen text falls back to bytes. With few texts the result has fewer entries.
    Raises ValueError if `vocab_size` is too small for the bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {MINIMUM_VOCAB_SIZE}; found {vocab_size}")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # As in Mixtral's own tokenizer, <s> precedes a text.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`, which must exist."""
    train_tokenizer(texts, vocab_size).save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "added_tokens_decoder": {
            str(number): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, token in enumerate(SPECIAL_TOKENS)
        },
        **special,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
