"""One transformer layer: attention and experts, each behind its norm, each added to the residual."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mixtral_run.config import RUNS_AGAIN
from mixtral_run.model.attention import Attention, AttentionInputs
from mixtral_run.model.lora import LoraSettings
from mixtral_run.model.megatron import BaseTransformerLayer, MegatronModule, TransformerConfig, apply_prefix_mapping
from mixtral_run.model.moe import MoELayer
from mixtral_run.model.norm import RMSNorm
from mixtral_run.model.offload import Offload


class MixtralLayer(MegatronModule, BaseTransformerLayer):
    """A layer as Megatron's TransformerBlock calls it; `attention_mask` carries AttentionInputs.

    recompute: `none`; `selective` makes norms, activations and permutations again in the backward pass (remake.py);
    with `full` the layer keeps only its input and runs again there; with `offload` that input lies in host memory.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        lora: LoraSettings | None = None,
        recompute: str = "none",
        base_precision: str = "bf16",
        offload: Offload | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.recompute = recompute
        self.offload = offload
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(config, layer_number, lora)
        self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MoELayer(config, layer_number, lora, base_precision)

    def forward(self, hidden_states: Tensor, attention_mask: AttentionInputs, **_: Any) -> tuple[Tensor, None]:
        """hidden_states: [sequence (/ TP), batch, hidden]; returns the same shape, and no cross-attention context."""
        if self.recompute in RUNS_AGAIN and self.training:
            # Within, checkpoint's own hooks take what is saved: the context sees the layer's input alone.
            with self._kept_elsewhere() if self.recompute == "offload" else nullcontext():
                hidden = checkpoint(self._compute, hidden_states, attention_mask, use_reentrant=False)
        else:
            hidden = self._compute(hidden_states, attention_mask)
        return hidden, None

    def _kept_elsewhere(self) -> saved_tensors_hooks:
        assert self.offload is not None, "a layer that offloads is given where to"
        return self.offload.hooks()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Transformer Engine keys it, which Megatron-LM and Megatron-Bridge read: there the first norm is part of
        linear_qkv, the second stands alone."""
        result: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(result, {f"{prefix}input_layernorm.": f"{prefix}self_attention.linear_qkv.layer_norm_"})
        return result

    def _compute(self, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
        selective = self.recompute == "selective" and self.training
        recipe = self.input_layernorm.recipe(hidden) if selective else None
        hidden = hidden + self.self_attention(self.input_layernorm(hidden), inputs, recipe)
        recipe = self.pre_mlp_layernorm.recipe(hidden) if selective else None
        output: Tensor = hidden + self.mlp(self.pre_mlp_layernorm(hidden), recipe)
        return output
