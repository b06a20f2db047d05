"""Tiny models in the forms in which people have them, and the config.json files of released models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from tests.support.tiny import write_tiny

_COMMON: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "initializer_range": 0.02, "model_type": "mixtral", "num_experts_per_tok": 2,
    "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True,
}  # fmt: skip
_8X7B = {
    **_COMMON, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "num_attention_heads": 32, "num_hidden_layers": 32, "router_aux_loss_coef": 0.02, "vocab_size": 32000,
}  # fmt: skip
_8X22B = {
    **_COMMON, "hidden_size": 6144, "intermediate_size": 16384, "max_position_embeddings": 65536,
    "num_attention_heads": 48, "num_hidden_layers": 56, "router_aux_loss_coef": 0.001, "vocab_size": 32000,
}  # fmt: skip
RELEASED_CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B-v0.1": {**_8X7B, "transformers_version": "4.36.0.dev0"},
    "Mixtral-8x7B-Instruct-v0.1": {**_8X7B, "transformers_version": "4.36.0.dev0"},
    # As first released: the window was taken out later.
    "Mixtral-8x7B-v0.1 of December 2023": {**_8X7B, "sliding_window": 4096},
    "Mixtral-8x22B-v0.1": {**_8X22B, "transformers_version": "4.38.0"},
    "Mixtral-8x22B-Instruct-v0.1": {
        **_8X22B, "vocab_size": 32768, "router_jitter_noise": 0.0, "transformers_version": "4.40.0.dev0",
    },
    # ChatML tokens added: two rows more.
    "a fine-tune with two further tokens": {**_8X7B, "vocab_size": 32002, "eos_token_id": 32000},
}  # fmt: skip
"""The values of config.json by model, as released."""


def at_small_width(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a released config at small width, with its own ratio of heads to groups; an odd vocabulary stays odd."""
    groups = 2
    heads = config["num_attention_heads"] // config["num_key_value_heads"] * groups
    small = {
        "hidden_size": heads * 8, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": heads,
        "num_key_value_heads": groups, "num_local_experts": 4, "head_dim": None,
        "vocab_size": 104 + config["vocab_size"] % 64, "max_position_embeddings": 256,
    }  # fmt: skip
    return {**config, **small, **changes}


SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = ("▁", "\n", "\t", *(chr(number) for number in range(0x21, 0x7F)))
PIECES = (*SPECIAL, *CHARACTERS)
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 256, "vocab_size": 104,
}  # fmt: skip


def write_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a tiny Mixtral with one safetensors file, whose tokenizer has an id for each character."""
    write_tiny(folder, dtype=dtype, num_shards=1, **{**SHAPE, "torch_dtype": str(dtype)[6:], **changes})
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer that puts `▁` for a space and before a text, as Mixtral's does."""
    vocabulary = {piece: number for number, piece in enumerate(PIECES)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    made.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {**special, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def change_config(folder: Path, **changes: Any) -> None:
    """Set fields of config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrite model.safetensors with the tensors that `change` returns."""
    file = folder / "model.safetensors"
    save_file({name: each.contiguous() for name, each in change(load_file(file)).items()}, file)


def write_sentencepiece(file: Path, *, model_type: int = 2, dummy_prefix: int = 1, unknown_type: int = 2) -> None:
    """Write the same vocabulary as a SentencePiece model: the protocol buffer of sentencepiece_model.proto, by hand."""
    types = {"<unk>": unknown_type, "<s>": 3, "</s>": 3}
    pieces = b"".join(
        _block(1, _block(1, piece.encode()) + b"\x15\0\0\0\0" + _number(3, types.get(piece, 1))) for piece in PIECES
    )
    trainer = _number(3, model_type) + _number(4, len(PIECES)) + _number(40, 0) + _number(41, 1) + _number(42, 2)
    rules = _block(1, b"identity") + _number(3, dummy_prefix) + _number(4, 0) + _number(5, 1)
    file.write_bytes(pieces + _block(2, trainer) + _block(3, rules))


def _number(field: int, value: int) -> bytes:
    found = b""
    for part in (field << 3, value):
        while part > 127:
            found, part = found + bytes([part & 127 | 128]), part >> 7
        found += bytes([part])
    return found


def _block(field: int, content: bytes) -> bytes:
    head = _number(field, len(content))
    return bytes([head[0] | 2]) + head[1:] + content
