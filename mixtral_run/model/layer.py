"""One transformer layer: attention and experts, each after its norm, each added to the residual."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from mixtral_run.config.recompute import RUNS_AGAIN
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.attention.attention import Attention, AttentionInputs
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.norm import RMSNorm
from mixtral_run.model.parallel.megatron import (
    BaseTransformerLayer,
    MegatronModule,
    TransformerConfig,
    apply_prefix_mapping,
)
from mixtral_run.model.recompute.checkpoint import checkpoint, with_gradient
from mixtral_run.model.recompute.kept_attention import KeptAttention
from mixtral_run.model.recompute.offload import Offload
from mixtral_run.model.routing.moe import MoELayer


@dataclass(frozen=True)
class LayerInputs:
    """Inputs that all layers share in one pass.

    dispatcher: None for the layers' own. expert_chunks: chunks of the tokens that the experts compute one after the
    other (routing/expert_chunks.py).
    """

    attention: AttentionInputs
    dispatcher: TokenDispatcher[Any] | None = None
    expert_chunks: int = 1


class MixtralLayer(MegatronModule, BaseTransformerLayer):
    """A layer with the interface that Megatron's TransformerBlock calls; `attention_mask` carries LayerInputs.

    recompute: `none` saves all activations; `selective` recomputes norms, activations and permutations in the backward
    pass (recompute/recipe.py); `full` saves only the layer's input and runs the layer again; `except-attention` also
    keeps attention's result (recompute/kept_attention.py); `offload` is full, and moves the input to host memory.
    recompute_layers: the first layers that do so, if `recompute` runs layers again; those after them are `selective`.
    None: all.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int = 1,
        lora: LoraSettings | None = None,
        recompute: str = "none",
        base_precision: str = "bf16",
        offload: Offload | None = None,
        *,
        recompute_layers: int | None = None,
        dispatcher: TokenDispatcher[Any],
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.recompute = recompute_of(layer_number, recompute, recompute_layers)
        self.offload = offload
        self._draws_numbers = lora is not None and lora.dropout > 0
        self.input_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.self_attention = Attention(config, layer_number, lora)
        self.pre_mlp_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon)
        self.mlp = MoELayer(config, layer_number, lora, base_precision, dispatcher=dispatcher)

    def forward(self, hidden_states: Tensor, attention_mask: LayerInputs, **_: Any) -> tuple[Tensor, None]:
        """Return the output for hidden_states [sequence (/ TP), batch, hidden], of the same shape, and no
        cross-attention context.
        """
        if self.recompute in RUNS_AGAIN and self.training and torch.is_grad_enabled():
            return self._run_again(hidden_states, attention_mask), None
        return self._compute(hidden_states, attention_mask), None

    def _run_again(self, hidden: Tensor, inputs: LayerInputs) -> Tensor:
        # use_reentrant=False would pass each tensor of the layer through hooks, which costs the host as much as another
        # forward pass. The reentrant form needs an input with a gradient, which frozen embeddings do not have.
        entry = hidden if hidden.requires_grad else with_gradient(hidden)
        # The forward pass saves only the layer's input, to which the context applies.
        with self._offloaded() if self.recompute == "offload" else nullcontext():
            kept = KeptAttention() if self.recompute == "except-attention" else None
            result: Tensor = checkpoint(
                self._compute, entry, inputs, kept, use_reentrant=True, preserve_rng_state=self._draws_numbers
            )
        return result

    def _offloaded(self) -> saved_tensors_hooks:
        assert self.offload is not None, "recompute='offload' needs an Offload"
        return self.offload.hooks()

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the shards under the keys of Transformer Engine, which Megatron-LM and Megatron-Bridge read.

        There the first norm is part of linear_qkv, and the second is a module of its own.
        """
        result: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(result, {f"{prefix}input_layernorm.": f"{prefix}self_attention.linear_qkv.layer_norm_"})
        return result

    def _compute(self, hidden: Tensor, inputs: LayerInputs, kept: KeptAttention | None = None) -> Tensor:
        selective = self.recompute == "selective" and self.training
        hidden, normed = self.input_layernorm.joined(hidden)
        recipe = self.input_layernorm.recipe(hidden) if selective else None
        attended = self.self_attention(normed, inputs.attention, recipe, kept)
        hidden, normed = self.pre_mlp_layernorm.joined(hidden, attended)
        recipe = self.pre_mlp_layernorm.recipe(hidden) if selective else None
        # A layer that runs again has gradients enabled the second time only, when nothing reads its output.
        unread = self.recompute in RUNS_AGAIN and self.training and torch.is_grad_enabled()
        output: Tensor = self.mlp(
            normed, recipe, inputs.dispatcher, num_chunks=inputs.expert_chunks, unread=unread, residual=hidden
        )
        return output


def recompute_of(layer_number: int, recompute: str, recompute_layers: int | None) -> str:
    """Return the recomputation of a layer, whose number begins at 1, for the settings of a run."""
    again = recompute not in RUNS_AGAIN or recompute_layers is None or layer_number <= recompute_layers
    return recompute if again else "selective"
