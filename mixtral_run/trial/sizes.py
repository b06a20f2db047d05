"""Sizes of the rehearsal: a Mixtral and a data set so small that LoRA on a frozen random base learns all examples.

A frozen random base is harder to adapt than a trained one: it knows no language, and its output layer is random as
well. Comments give figures of 2 CPU cores (plain PyTorch, float32, the adapters of `finetune`: r 16, alpha 32,
linear_qkv, linear_proj and one per expert on linear_fc1 and linear_fc2). Under transformers and peft the loss falls
from 8.25 to 0.003 and 16 of 16 answers are exact, with bf16 weights and activations as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.train.data.templates.prompt import prompt_text

INSTRUCTIONS = Path(__file__).with_name("instructions.jsonl")
"""About 200 instruction/response examples in the format of `--data-path`, the shortest responses first."""

TINY = MixtralArchitecture(
    num_layers=4,
    # At 64 the loss over all examples falls half as far in the same number of steps.
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
"""3.6 million parameters (14.4 MB in float32), with all features of Mixtral 8x7B: grouped queries, 8 experts, top-2."""


@dataclass(frozen=True, kw_only=True)
class RehearsalPlan:
    """The model, data and training of `rehearse`. Fields have the names of `finetune`'s settings."""

    architecture: MixtralArchitecture = TINY
    dtype: str = "float32"
    num_shards: int = 3
    seed: int = 1234
    # A compromise: LoRA learns more easily with large weights, but float32 rounds in proportion to the logits. At 0.15
    # everywhere they reach ±8 and differ from HF's by 4e-5 at TP2. Small weights inside and 0.07 in embeddings and the
    # output layer keep the difference below 2e-6, with a trained adapter below 5e-6, and answers can still be learned.
    initializer_range: float = 0.04
    embedding_range: float = 0.07
    # The examples with the shortest answers, which come first in the file: their loss is below 0.1 after 25 steps. All
    # 208 take too long: after 200 steps of 16 (46 s) the loss has fallen from 8.4 to 0.8, and 74 answers are exact.
    num_examples: int = 16
    # The longest of these examples has 35 tokens. A multiple of 8, so that sequence parallelism can split it.
    seq_length: int = 48
    micro_batch_size: int = 4
    # Two micro batches a step, so that gradient accumulation is rehearsed as well.
    global_batch_size: int = 8
    train_iters: int = 60
    # 2e-3 to 5e-3 give 16 of 16 exact answers; at 1e-2 the loss is unstable.
    lr: float = 3e-3
    min_lr: float = 3e-4
    lr_warmup_iters: int = 10
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    lora_rank: int = 16
    # With 64 the logits of single tokens differ from PEFT's by 1.2e-5, because a larger scale rounds more.
    lora_alpha: float = 32.0
    lora_target_modules: tuple[str, ...] = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    # More than the longest answer, so that generation ends with </s> and not at the limit.
    max_new_tokens: int = 24
    # The last loss over the first; measured 0.19 over 7.17.
    max_final_loss_ratio: float = 0.2


PLAN = RehearsalPlan()


def tokenizer_texts() -> list[str]:
    """Return the texts that the tiny tokenizer is trained on: every shipped example in the chat format."""
    examples = [json.loads(line) for line in _shipped_lines()]
    return [f"{prompt_text(each['instruction'])} {each['response']}" for each in examples]


def write_rehearsal_examples(path: Path, num_examples: int = PLAN.num_examples) -> None:
    """Write the first `num_examples` shipped examples to `path` as JSONL. Raises ValueError if there are fewer."""
    lines = _shipped_lines()
    if not 1 <= num_examples <= len(lines):
        raise ValueError(f"num_examples must be between 1 and {len(lines)}; found {num_examples}")
    path.write_text("".join(f"{line}\n" for line in lines[:num_examples]), encoding="utf-8")


def _shipped_lines() -> list[str]:
    return INSTRUCTIONS.read_text(encoding="utf-8").splitlines()
