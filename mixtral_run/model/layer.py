"""One transformer layer: attention and experts, each behind its norm, each added to the residual."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from mixtral_run.config.verbs import RUNS_AGAIN
from mixtral_run.model.attention import Attention, AttentionInputs
from mixtral_run.model.lora_settings import LoraSettings
from mixtral_run.model.moe import MoELayer
from mixtral_run.model.norm import RMSNorm
from mixtral_run.model.parallel.megatron import (
    BaseTransformerLayer,
    MegatronModule,
    TransformerConfig,
    apply_prefix_mapping,
)
from mixtral_run.model.recompute.offload import Offload


class MixtralLayer(MegatronModule, BaseTransformerLayer):
    """A layer as Megatron's TransformerBlock calls it; `attention_mask` carries AttentionInputs.

    recompute: `none`; `selective` makes norms, activations and permutations again in the backward pass (recipe.py);
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
        self._draws_numbers = lora is not None and lora.dropout > 0
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(config, layer_number, lora)
        self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MoELayer(config, layer_number, lora, base_precision)

    def forward(self, hidden_states: Tensor, attention_mask: AttentionInputs, **_: Any) -> tuple[Tensor, None]:
        """hidden_states: [sequence (/ TP), batch, hidden]; returns the same shape, and no cross-attention context."""
        if self.recompute in RUNS_AGAIN and self.training:
            return self._run_again(hidden_states, attention_mask), None
        return self._compute(hidden_states, attention_mask), None

    def _run_again(self, hidden: Tensor, inputs: AttentionInputs) -> Tensor:
        # Not torch's newer way, which takes each tensor of the layer through hooks: that costs the host as much as
        # another forward pass. This one asks for an input with a gradient, which frozen embeddings do not have.
        entry = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        # The forward pass saves nothing but the layer's input, which is what the context sees.
        with self._kept_elsewhere() if self.recompute == "offload" else nullcontext():
            result: Tensor = checkpoint(
                self._compute, entry, inputs, use_reentrant=True, preserve_rng_state=self._draws_numbers
            )
        return result

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
