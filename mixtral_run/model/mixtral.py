"""Mixtral as a Megatron GPTModel: Megatron's embedding, block, output layer and loss with the kit's own layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from mixtral_run.config.context import MOST_LOGITS
from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.errors import ConfigError
from mixtral_run.model.adapters.cast_adapters import refresh
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.adapters.trained_also import is_trained_also, store_in_fp32
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.model.attention.attention import AttentionInputs, KeyValueCache
from mixtral_run.model.attention.context_attention import ContextInputs
from mixtral_run.model.attention.packed_attention import Packed, has_packed_attention
from mixtral_run.model.attention.rotary import Rotary
from mixtral_run.model.chunked_loss import chunked_cross_entropy
from mixtral_run.model.dispatch.base import TokenDispatcher
from mixtral_run.model.experts import Experts
from mixtral_run.model.kernels.cache import copy_from_image
from mixtral_run.model.kernels.grouped_mm import has_grouped_product
from mixtral_run.model.kernels.loss.cross_entropy import cross_entropy, has_cross_entropy
from mixtral_run.model.kernels.requirements import EIGHT_BIT_ALIGNMENT, attention_problems, kernel_problems
from mixtral_run.model.kernels.selected import capability_of, select
from mixtral_run.model.layer import LayerInputs, MixtralLayer, recompute_of
from mixtral_run.model.norm import RMSNorm
from mixtral_run.model.parallel.context import ContextPart
from mixtral_run.model.parallel.frozen_linear import OutputLayer
from mixtral_run.model.parallel.megatron import GPTModel, ModuleSpec, TransformerBlockSubmodules, TransformerConfig
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.offload import Offload
from mixtral_run.model.routing.moe import unlimited_dispatcher
from mixtral_run.model.routing.router_counts import RouterCounts
from mixtral_run.model.routing.router_loss import RouterLoss

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class ModelSettings:
    """Settings of the model that are not part of its architecture or of the mesh."""

    dtype: torch.dtype
    sequence_parallel: bool
    lora: LoraSettings | None = None
    recompute: str = "none"
    base_precision: str = "bf16"  # fp8, nf4: frozen weights of the experts in 8 or 4 bit; bf16: in dtype
    kernels: str = "auto"  # the value of --kernels; it counts for the whole process
    expert_chunks: int = 1  # of the tokens of a pass (routing/expert_chunks.py); decoding is never cut
    attention_precision: str = "bf16"  # fp8: frozen projections of attention and output layer in 8 bit; bf16: in dtype
    recompute_layers: int | None = None  # the first layers, which `recompute` runs again; None: all

    @property
    def base_storage(self) -> str:
        """Form of the frozen experts: base_precision, or fp32 where that means a dtype of 32 bit."""
        return self._storage(self.base_precision)

    @property
    def attention_storage(self) -> str:
        """Form of the frozen projections of attention and of the output layer, in the same words."""
        return self._storage(self.attention_precision)

    def _storage(self, precision: str) -> str:
        return "fp32" if precision == "bf16" and self.dtype is torch.float32 else precision


class _Gpt(GPTModel):
    """GPTModel whose loss needs no copies of the logits where a process has the whole vocabulary, and whose output
    layer may be stored in 8 bit.
    """

    output_layer: Any

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.output_layer = OutputLayer.in_place_of(self.output_layer)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return the losses [batch, sequence] of labels of the same shape, for logits [sequence, batch, vocabulary]."""
        if self.config.tensor_model_parallel_size > 1 or not has_cross_entropy(logits):
            losses: Tensor = super().compute_language_model_loss(labels, logits)
            return losses
        return cross_entropy(logits, labels.transpose(0, 1)).transpose(0, 1).contiguous()


class MixtralModel(torch.nn.Module):
    """GPTModel with causal attention, and the rotary positions that all its layers share."""

    def __init__(self, architecture: MixtralArchitecture, settings: ModelSettings, mesh: Mesh) -> None:
        super().__init__()
        self.architecture = architecture
        self.settings = settings
        self.mesh = mesh
        self.base_fingerprint = ""  # of the base weights; set when they are loaded
        config = transformer_config(architecture, settings, mesh)
        params = {
            "lora": settings.lora,
            "recompute": settings.recompute,
            "recompute_layers": settings.recompute_layers,
            "base_precision": settings.base_precision,
            "offload": Offload(mesh.device),
            "dispatcher": unlimited_dispatcher(mesh.expert_group, architecture.num_experts),
        }
        layer = ModuleSpec(module=MixtralLayer, params=params)
        self.gpt = _Gpt(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * architecture.num_layers, layer_norm=RMSNorm),
            vocab_size=architecture.padded_vocab_size(mesh.tensor_size),
            max_sequence_length=architecture.max_position_embeddings,
            # The layers rotate queries and keys themselves: positions may be those of a cache or of packed samples.
            position_embedding_type="none",
        )
        for split in (self.gpt.embedding.word_embeddings.weight, self.gpt.output_layer.weight):
            # Megatron marks its weights only if it also initializes them.
            mark(split, split=True)
        if architecture.padded_vocab_size(mesh.tensor_size) != architecture.vocab_size:
            self.gpt.output_layer.register_forward_hook(self._without_padding)
        # With a start that is subtracted, the layers cast what they put together of A and of the start.
        casts = settings.lora is not None and not settings.lora.starts_from_weights
        self._adapters = [parameter for name, parameter in self.named_parameters() if casts and is_adapter(name)]
        self.rotary = Rotary(architecture.kv_channels, architecture.rotary_base, mesh.device)
        self.router_counts: RouterCounts | None = None
        self.router_loss: RouterLoss | None = None
        self.context: ContextPart | None = None
        if mesh.context_size > 1:
            self.context = ContextPart(mesh.context_rank, mesh.context_size, mesh.context_group)

    def losses(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        packed: Packed | None = None,
        dispatcher: TokenDispatcher[Any] | None = None,
    ) -> Tensor:
        """Return the cross entropy of each label, fp32 [batch, sequence]. tokens, labels: int64 [batch, sequence].

        packed: boundaries of samples if rows hold several; positions: [batch, sequence], which restart at 0 in each
        sample. dispatcher: of this pass and its backward pass; None for the layers' own. Under context parallelism each
        rank gets the whole rows and returns the losses of its part of them, with 0 elsewhere: their sum over the ranks
        is the rows'. All ranks of the TP, CP and EP groups must call.
        """
        if self.context is None:
            attention = self._attention_inputs(tokens.shape[1], positions, None, None, packed)
            return self._losses(tokens, labels, self._inputs(attention, dispatcher))
        part, (batch, length) = self.context, tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device)[None]
        attention = self._attention_inputs(length // part.size, part.of_row(positions), None, None)
        masked = not has_packed_attention(attention.cosine)
        attention.context = ContextInputs.of(part, length, packed, batch, masked=masked, device=tokens.device)
        losses = self._losses(part.of_row(tokens), part.of_row(labels), self._inputs(attention, dispatcher))
        return part.into_row(losses)

    def _losses(self, tokens: Tensor, labels: Tensor, inputs: LayerInputs) -> Tensor:
        """Return the cross entropy of each label, fp32 [batch, sequence]; of many tokens chunk by chunk."""
        if tokens.numel() <= MOST_LOGITS:
            losses: Tensor = self.gpt(tokens, None, inputs, labels=labels)
            return losses
        # The same as GPTModel.forward as far as the output layer.
        hidden = self.gpt.decoder(
            hidden_states=self.gpt.embedding(input_ids=tokens, position_ids=None), attention_mask=inputs
        )

        return chunked_cross_entropy(hidden, labels, self.gpt, MOST_LOGITS)

    def logits(
        self,
        tokens: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        last_only: bool = False,
        dispatcher: TokenDispatcher[Any] | None = None,
    ) -> Tensor:
        """Return logits [batch, sequence, vocabulary], whole on every rank, for tokens int64 [batch, sequence].

        Args:
            positions: int [batch, sequence]; default 0, 1, ….
            mask: see AttentionInputs.
            cache: is filled, and its length advanced.
            last_only: return only the last position, [batch, 1, vocabulary]; not under sequence parallelism.
            dispatcher: of this pass; None for the layers' own.

        All ranks of the TP and EP groups must call.
        """
        inputs = self._inputs(self._attention_inputs(tokens.shape[1], positions, mask, cache), dispatcher)
        with self._output_of_last() if last_only else nullcontext():
            logits: Tensor = self.gpt(tokens, None, inputs, runtime_gather_output=True)
        if cache is not None:
            cache.length += tokens.shape[1]
        return logits

    def _without_padding(self, _: object, __: object, outputs: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        """Return the output layer's logits with those of the vocabulary's padding at -inf: they get no probability.

        Gathered logits are cut instead.
        """
        logits, bias = outputs
        size, width = self.architecture.vocab_size, logits.shape[-1]
        if width == self.architecture.padded_vocab_size(self.mesh.tensor_size):
            return logits[..., :size], bias
        keep = min(width, max(0, size - self.mesh.tensor_rank * width))
        return torch.nn.functional.pad(logits[..., :keep], (0, width - keep), value=float("-inf")), bias

    def _output_of_last(self) -> RemovableHandle:
        """Return a context in which the output layer sees only the last of hidden states [sequence, batch, hidden]."""
        assert not self.gpt.config.sequence_parallel, "under sequence parallelism a rank has a part of the sequence"
        hook: RemovableHandle = self.gpt.output_layer.register_forward_pre_hook(
            lambda _, arguments: (arguments[0][-1:], *arguments[1:])
        )
        return hook

    def quantize_experts(
        self, fill: Callable[[], object], done: Callable[[int, Experts], object] | None = None
    ) -> None:
        """Quantize the experts, one linear layer of all local experts at a time, if the base is in 8 or 4 bit.

        For each: give its weight memory, call `fill` to load it, and quantize it. After both of a layer, call `done`
        with the layer's number, from 0, and its experts. All weights use the same memory one after the other. New
        memory for each would leave gaps in torch's segments, between the quantized values that stay.
        """
        if self.settings.base_precision == "bf16":
            return
        weights = [linear.weight for linear in self.experts[0].linears.values() if linear.weight is not None]
        most = max(weight.numel() for weight in weights)
        memory = torch.empty(most, dtype=weights[0].dtype, device=self.mesh.device)
        for number, experts in enumerate(self.experts):
            for linear in experts.linears.values():
                linear.allocate(memory)
                fill()
                linear.quantize()
            if done is not None:
                done(number, experts)

    def quantize_attention(self) -> None:
        """Quantize the loaded projections of attention and the output layer, if --attention-precision is fp8.

        All ranks must call.
        """
        if self.settings.attention_precision == "bf16":
            return
        for layer in self.gpt.decoder.layers:
            layer.self_attention.linear_qkv.quantize()
            layer.self_attention.linear_proj.quantize()
        self.gpt.output_layer.quantize()

    def refresh_adapters(self) -> None:
        """Update the 16-bit copies of the adapters that have changed. Every pass does; before a replay, call it."""
        if self.settings.lora is not None and self.settings.dtype is torch.bfloat16:
            refresh(self._adapters, self.settings.dtype)

    @property
    def is_capturable(self) -> bool:
        """Return True if the experts' products read the numbers of rows on the GPU: such a pass never waits for the
        GPU, and can be captured in a CUDA graph.
        """
        mesh, lora = self.mesh, self.settings.lora
        probe = torch.empty(1, dtype=self.settings.dtype, device=mesh.device)
        widths = (self.architecture.hidden_size, self.architecture.ffn_hidden_size)
        rank = lora.of("linear_fc1").computed_rank if lora is not None else 8
        return mesh.device.type == "cuda" and has_grouped_product(probe, *widths, rank)

    def recompute(self, recompute: str, layers: int | None = None) -> None:
        """Set what backward passes recompute from now on; see MixtralLayer for both arguments."""
        self.settings = dataclasses.replace(self.settings, recompute=recompute, recompute_layers=layers)
        for layer in self.gpt.decoder.layers:
            layer.recompute = recompute_of(layer.layer_number, recompute, layers)

    def count_choices(self) -> RouterCounts:
        """Count from now on which experts the routers choose (router_counts.py), and return the counts."""
        routers = [layer.mlp.router for layer in self.gpt.decoder.layers]
        split = bool(self.gpt.config.sequence_parallel)
        self.router_counts = RouterCounts(routers, self.architecture.num_experts, self.mesh, sequence_parallel=split)
        return self.router_counts

    def balance_routers(self, coefficient: float) -> None:
        """Have the routers trained for balance from now on (router_loss.py); each pass must be counted."""
        routers = [layer.mlp.router for layer in self.gpt.decoder.layers]
        a, split = self.architecture, bool(self.gpt.config.sequence_parallel)
        self.router_loss = RouterLoss(routers, a.num_experts, a.moe_router_topk, coefficient, self.mesh, split=split)

    @property
    def experts(self) -> list[Experts]:
        """Return this rank's experts, layer by layer."""
        return [layer.mlp.experts for layer in self.gpt.decoder.layers]

    def _inputs(self, attention: AttentionInputs, dispatcher: TokenDispatcher[Any] | None) -> LayerInputs:
        if dispatcher is not None:
            assert self.mesh.expert_size > 1, "with all experts in one process tokens are only permuted"
            dispatcher.begin_pass()
        # A pass of generation over one token of each sequence is short.
        long = attention.cosine.shape[1] > 1
        return LayerInputs(attention, dispatcher, self.settings.expert_chunks if long else 1)

    def _attention_inputs(
        self,
        length: int,
        positions: Tensor | None,
        mask: Tensor | None,
        cache: KeyValueCache | None,
        packed: Packed | None = None,
    ) -> AttentionInputs:
        if positions is None:
            positions = torch.arange(length, device=self.mesh.device)[None]
        cosine, sine = self.rotary.inputs(positions, self.settings.dtype)
        self.refresh_adapters()
        if packed is not None and not has_packed_attention(cosine):
            # Build the mask once for all layers.
            mask, packed = packed.mask(), None
        return AttentionInputs(cosine, sine, mask, cache, packed)


def transformer_config(architecture: MixtralArchitecture, settings: ModelSettings, mesh: Mesh) -> TransformerConfig:
    """Return Megatron's configuration of the same model."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        moe_ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.kv_channels,
        num_moe_experts=architecture.num_experts,
        moe_router_topk=architecture.moe_router_topk,
        moe_router_load_balancing_type="none",
        normalization="RMSNorm",
        layernorm_epsilon=architecture.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=settings.dtype,
        bf16=settings.dtype is torch.bfloat16,
        pipeline_dtype=settings.dtype,
        # Weights always come from a checkpoint, or from `initialize_weights`.
        perform_initialization=False,
        tensor_model_parallel_size=mesh.tensor_size,
        expert_model_parallel_size=mesh.expert_size,
        expert_tensor_parallel_size=1,
        sequence_parallel=settings.sequence_parallel and mesh.tensor_size > 1,
        gradient_accumulation_fusion=False,
    )


def build_model(architecture: MixtralArchitecture, settings: ModelSettings, mesh: Mesh) -> MixtralModel:
    """Return the model on this rank's device, with uninitialized base weights and initial adapters (B = 0).

    With adapters all other parameters are frozen. The process computes with the kernels of the model that was built
    last (kernels/selected.py). Raises ConfigError if the device lacks these. All ranks must call.
    """
    capability = capability_of(mesh.device)
    problems = kernel_problems(capability, settings.kernels)
    if settings.attention_precision == "fp8":
        widths = architecture.attention_widths(mesh.tensor_size)
        able = architecture.aligned_tensor_sizes(EIGHT_BIT_ALIGNMENT)
        problems += attention_problems(capability, settings.kernels, settings.dtype.itemsize, widths, able)
    if problems:
        raise ConfigError(SETTINGS_ERROR, problems=problems)
    select(settings.kernels)
    if mesh.device.type == "cuda":
        copy_from_image()
    model = MixtralModel(architecture, settings, mesh)
    if settings.lora is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained(name) or is_trained_also(name, settings.lora))
        store_in_fp32(model.gpt, settings.lora, settings.dtype)
    return model


def is_adapter(parameter_name: str) -> bool:
    """Return True if a parameter belongs to an adapter, by its name in the model or in a checkpoint."""
    return is_trained(parameter_name) or ".initial_in" in parameter_name or ".initial_out" in parameter_name


def is_trained(parameter_name: str) -> bool:
    """Return True if a parameter of an adapter is trained: A and B, but not the start that is subtracted."""
    return ".linear_in" in parameter_name or ".linear_out" in parameter_name
