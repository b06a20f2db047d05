"""The sizes of the rehearsal: a Mixtral so small, and so few pairs, that a frozen random base can learn them by LoRA.

A frozen random base is a harder start than a trained one: nothing in it knows language, and the output layer is random,
too. What was measured on 2 CPU cores (plain PyTorch, float32, the adapters of `finetune`: r 16, alpha 32, linear_qkv,
linear_proj and one per expert on linear_fc1 and linear_fc2) is beside each number. The whole plan under transformers
and peft: loss 8.25 → 0.003, 16 of 16 answers exact. With bf16 weights and activations they are exact as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.resources import INSTRUCTIONS
from mixtral_run.train.data.prompt import prompt_text

TINY = MixtralArchitecture(
    num_layers=4,
    # At 64 the loss over all pairs falls half as far in the same number of steps.
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    num_experts=8,
    moe_router_topk=2,
    # Megatron pads the vocabulary to a multiple of 128 × TP: 1,024 needs no padding up to TP 8.
    vocab_size=1024,
    max_position_embeddings=32768,
    rotary_base=1e6,
    layernorm_epsilon=1e-5,
)
"""3.6 million parameters (14.4 MB in float32), with all that Mixtral 8x7B has: grouped queries, 8 experts, top-2."""


@dataclass(frozen=True, kw_only=True)
class RehearsalPlan:
    """What `rehearse` writes and trains. The names are those of `finetune`'s settings where there are such."""

    architecture: MixtralArchitecture = TINY
    dtype: str = "float32"
    num_shards: int = 3
    seed: int = 1234
    # Two needs pull apart. Large weights make it easy to learn by LoRA, but float32 rounds in proportion to the logits:
    # at 0.15 throughout they reach ±8 and differ from HF's by 4e-5 at TP2. Small ones inside and 0.07 in embeddings and
    # output layer keep the difference below 2e-6, with a trained adapter below 5e-6, and still let answers be learned.
    initializer_range: float = 0.04
    embedding_range: float = 0.07
    # The shortest answers, which stand first in the file. All 208 pairs do not fit into the time: 200 steps of 16 took
    # 46 s, the loss went from 8.4 to 0.8, and 74 answers were exact. Over these 16 it is below 0.1 after 25 steps.
    num_pairs: int = 16
    # The longest of these pairs has 35 tokens; a multiple of 8, so that sequence parallelism can split it.
    seq_length: int = 48
    micro_batch_size: int = 4
    # Two micro batches a step: gradient accumulation is rehearsed as well.
    global_batch_size: int = 8
    train_iters: int = 60
    # 2e-3 … 5e-3 all give 16 of 16; at 1e-2 the loss jumps.
    lr: float = 3e-3
    min_lr: float = 3e-4
    lr_warmup_iters: int = 10
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    lora_rank: int = 16
    # With 64 the logits of single tokens differ from PEFT's by 1.2e-5: more gain, more rounding.
    lora_alpha: float = 32.0
    lora_target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    # Longer than the longest of the answers, so that generation ends by </s>, not by the limit.
    max_new_tokens: int = 24
    # "Clearly below its start": measured 7.17 → 0.19.
    highest_final_loss_share: float = 0.2


PLAN = RehearsalPlan()


def tokenizer_texts() -> list[str]:
    """What the tiny tokenizer is trained on: every shipped pair, as it stands in a prompt."""
    pairs = [json.loads(line) for line in _shipped_lines()]
    return [f"{prompt_text(pair['instruction'])} {pair['response']}" for pair in pairs]


def write_rehearsal_pairs(path: Path, num_pairs: int = PLAN.num_pairs) -> None:
    """Write the first `num_pairs` of the shipped pairs to `path`, a JSONL as a user's own. ValueError past the end."""
    lines = _shipped_lines()
    if not 1 <= num_pairs <= len(lines):
        raise ValueError(f"num_pairs must be between 1 and {len(lines)}; found {num_pairs}")
    path.write_text("".join(f"{line}\n" for line in lines[:num_pairs]), encoding="utf-8")


def _shipped_lines() -> list[str]:
    return INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
