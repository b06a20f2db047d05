"""Tokenizers and pairs that several unit tests share."""

from pathlib import Path
from typing import Any

import pytest

from mixtral_run.trial.sizes import tokenizer_texts
from mixtral_run.trial.tiny_tokenizer import write_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rehearsal's tokenizer, as its files."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tokenizer_texts(), 1024, 32768)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_tokenizer_folder: Path) -> Any:
    from mixtral_run.train.data.templates.prompt import load_tokenizer

    return load_tokenizer(tiny_tokenizer_folder)


@pytest.fixture(scope="session")
def llama_like_tokenizer() -> Any:
    """A stand-in for Mixtral's released tokenizer, which cannot be had here: it marks spaces and falls back to bytes
    in the same way (normalizer Prepend ▁, Replace), but its merges come from the shipped pairs."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(tokenizer_texts(), trainer)
    # As released: no pre-tokenizer, spaces become ▁ in the normalizer.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
