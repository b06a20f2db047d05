"""The sizes of a Mixtral model, read from HF's config.json. Standard library only, so that every part can import it."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from mixtral_run.config.lora import LoraShape, module_rank, shares_expert_adapters
from mixtral_run.errors import WeightsError
from mixtral_run.model.hf_config import DEFAULT_POSITIONS, config_problems, rotary_base

VOCABULARY_MULTIPLE = 128
"""Megatron's default of --make-vocab-size-divisible-by: a vocabulary that TP does not divide is padded to a multiple of
this times TP."""

EXAMPLE_NAME = "mistralai/Mixtral-8x7B-v0.1"
"""Example of a name on the hub, for messages."""


@dataclass(frozen=True, kw_only=True)
class MixtralArchitecture:
    """Sizes of a model in Megatron's names; comments give HF's names where they differ."""

    num_layers: int  # num_hidden_layers
    hidden_size: int
    ffn_hidden_size: int  # intermediate_size
    num_attention_heads: int
    num_query_groups: int  # num_key_value_heads
    kv_channels: int  # head_dim
    num_experts: int  # num_local_experts
    moe_router_topk: int  # num_experts_per_tok
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float  # rope_theta
    layernorm_epsilon: float  # rms_norm_eps
    sliding_window: int | None = None  # None: attention to all earlier tokens

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Return the rows of embedding and output layer, over all ranks of TP.

        A vocabulary that TP divides is not padded; another one is padded as Megatron pads it.
        """
        if self.vocab_size % tensor_model_parallel_size == 0:
            return self.vocab_size
        multiple = VOCABULARY_MULTIPLE * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def qkv_size(self) -> int:
        """Return the rows of linear_qkv: queries, keys and values of all groups."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def projection_size(self) -> int:
        """Return the columns of linear_proj: all heads concatenated."""
        return self.num_attention_heads * self.kv_channels

    def attention_widths(self, tensor_model_parallel_size: int) -> tuple[int, ...]:
        """Return the sides of the weights of linear_qkv, linear_proj and the output layer on a rank of TP."""
        tp = tensor_model_parallel_size
        split = (self.qkv_size, self.projection_size, self.padded_vocab_size(tp))
        return self.hidden_size, *(size // tp for size in split)

    def aligned_tensor_sizes(self, multiple: int) -> list[int]:
        """Return the sizes of TP over which the model can be split so that all `attention_widths` have this factor."""
        shared = math.gcd(self.num_attention_heads, self.num_query_groups)
        sizes = (each for each in range(1, shared + 1) if shared % each == 0)
        return [each for each in sizes if not any(width % multiple for width in self.attention_widths(each))]

    @property
    def num_parameters(self) -> int:
        """Return the number of parameters, embeddings and output layer included (46,702,792,704 for Mixtral 8x7B)."""
        hidden = self.hidden_size
        attention = hidden * (self.qkv_size + self.projection_size)
        experts = self.num_experts * 3 * hidden * self.ffn_hidden_size
        layer = attention + experts + self.num_experts * hidden + 2 * hidden
        return self.num_layers * layer + 2 * self.vocab_size * hidden + hidden

    @property
    def num_active_parameters(self) -> int:
        """Return the number of parameters that one token passes through, without the embedding."""
        hidden = self.hidden_size
        attention = hidden * (self.qkv_size + self.projection_size)
        experts = self.moe_router_topk * 3 * hidden * self.ffn_hidden_size
        return self.num_layers * (attention + experts + self.num_experts * hidden) + self.vocab_size * hidden

    def num_adapter_parameters(self, shape: LoraShape) -> int:
        """Return the number of parameters of LoRA adapters: rank × (in + out) a linear layer and expert."""
        experts = 1 if shares_expert_adapters(shape) else self.num_experts
        sizes = {
            "linear_qkv": self.hidden_size + self.qkv_size,
            "linear_proj": self.projection_size + self.hidden_size,
            "linear_fc1": experts * (self.hidden_size + 2 * self.ffn_hidden_size),
            "linear_fc2": experts * (self.ffn_hidden_size + self.hidden_size),
        }
        return self.num_layers * sum(module_rank(shape, name) * sizes[name] for name in shape.lora_target_modules)

    def num_trained_also(self, names: Sequence[str]) -> int:
        """Return the number of parameters of these weights of the base (config/lora.py, TRAINED_ALSO)."""
        sizes = {
            "embeddings": self.vocab_size * self.hidden_size,
            "lm_head": self.vocab_size * self.hidden_size,
            "norms": (2 * self.num_layers + 1) * self.hidden_size,
            "router": self.num_layers * self.num_experts * self.hidden_size,
        }
        return sum(sizes[name] for name in names)

    def layout_problems(self, tensor_model_parallel_size: int, expert_model_parallel_size: int) -> list[str]:
        """Return why the model cannot be split over TP and EP; an empty list if it can."""
        tp, ep = tensor_model_parallel_size, expert_model_parallel_size
        problems = [
            f"--tensor-model-parallel-size {tp}: does not divide the model's {count} {what}"
            for what, count in (
                ("attention heads", self.num_attention_heads),
                ("query groups", self.num_query_groups),
            )
            if count % tp
        ]
        if self.num_experts % ep:
            problems.append(
                f"--expert-model-parallel-size {ep}: does not divide the model's {self.num_experts} experts"
            )
        return problems

    def differing(self, other: MixtralArchitecture) -> list[str]:
        """Return the names of the fields whose values differ from another architecture's."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]

    def to_mapping(self) -> dict[str, Any]:
        """Return all fields by name, without a sliding window that is not there."""
        found = dataclasses.asdict(self)
        if self.sliding_window is None:
            del found["sliding_window"]
        return found

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """Build an architecture from the result of `to_mapping`. Raises TypeError on a missing or unknown key."""
        return cls(**values)

    @classmethod
    def from_hf_config(cls, values: Mapping[str, Any], *, where: str) -> Self:
        """Build an architecture from the content of config.json. Raises WeightsError with everything that is not
        Mixtral's.
        """
        problems = config_problems(values)
        if problems:
            raise WeightsError("This is not a Mixtral model that can be converted.", where=where, problems=problems)
        heads = values["num_attention_heads"]
        return cls(
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            ffn_hidden_size=values["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=values["num_key_value_heads"],
            kv_channels=values.get("head_dim") or values["hidden_size"] // heads,
            num_experts=values.get("num_local_experts") or values["num_experts"],
            moe_router_topk=values["num_experts_per_tok"],
            vocab_size=values["vocab_size"],
            max_position_embeddings=values.get("max_position_embeddings") or DEFAULT_POSITIONS,
            rotary_base=rotary_base(values),
            layernorm_epsilon=float(values.get("rms_norm_eps") or 1e-5),
            sliding_window=values.get("sliding_window"),
        )

    @classmethod
    def from_hf_directory(cls, directory: Path) -> Self:
        """Read DIRECTORY/config.json. Raises WeightsError if it is missing, broken or of another model."""
        return cls.from_hf_config(read_config(directory), where=str(directory / "config.json"))


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of DIRECTORY/config.json. Raises WeightsError if it is missing or broken."""
    path = directory / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(
            "The HF model has no config.json.",
            where=str(path),
            expected="a directory as downloaded from the hub",
            found=_content(directory),
            next_command=f"a directory that has one, or a name on the hub, such as {EXAMPLE_NAME}",
        ) from error
    except OSError as error:
        raise WeightsError(
            "The HF model's config.json cannot be read.",
            where=str(path),
            expected="a directory as downloaded from the hub, which this user may read",
            found=error.strerror,
            next_command=shlex.join(["ls", "-ld", str(directory), str(path)]),
        ) from error
    # ValueError: also an integer of thousands of digits. RecursionError: nested thousands deep.
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            "The HF model's config.json is not valid JSON.", where=str(path), found=str(error)[:200]
        ) from error
    if not isinstance(values, dict):
        raise WeightsError("The HF model's config.json is not a JSON object.", where=str(path))
    return values


def _content(directory: Path) -> str:
    """Describe what a directory contains, in a few words."""
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else None
    if names is None:
        return "no such directory"
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "") or "an empty directory"


MIXTRAL_8X7B = MixtralArchitecture(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    kv_channels=128,
    num_experts=8,
    moe_router_topk=2,
    vocab_size=32000,
    max_position_embeddings=32768,
    rotary_base=1e6,
    layernorm_epsilon=1e-5,
)
"""The architecture of mistralai/Mixtral-8x7B-v0.1 and -Instruct-v0.1."""
