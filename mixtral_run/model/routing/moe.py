"""The mixture-of-experts layer: route, dispatch tokens to the processes of their experts, compute, combine.

Routing follows HF's Mixtral: softmax over all experts in fp32, of which the top k are renormalized. With sequence
parallelism each TP rank routes its own part of the sequence; experts are whole (ETP 1) and distributed over EP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.dispatch.all_to_all import AllToAllDispatcher
from mixtral_run.model.dispatch.base import ExpertInputs, TokenDispatcher, added
from mixtral_run.model.dispatch.local import LocalDispatcher
from mixtral_run.model.experts import Experts
from mixtral_run.model.kernels.decoding.few_tokens import are_few, route
from mixtral_run.model.parallel.megatron import MegatronModule, TransformerConfig
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.recipe import Recipe
from mixtral_run.model.routing.expert_chunks import in_chunks
from mixtral_run.model.routing.router_loss import RouterLoss


class Router(MegatronModule):
    """Linear layer that chooses the experts of each token. weight: [experts, hidden]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.topk: int = config.moe_router_topk
        self.loss: RouterLoss | None = None
        self.weight = torch.nn.Parameter(
            torch.empty(
                config.num_moe_experts,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        mark(self.weight, partial=config.sequence_parallel)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return routing probabilities fp32 and expert numbers int64, both [tokens, topk], for tokens [tokens, hidden],
        and the tokens.

        The probabilities of a token sum to 1. All is computed in fp32: in bf16 a near tie sends a token to another
        expert, which dominates the model's error. All that follows must use the tokens that are returned: their
        gradient is added where that of the router is computed.
        """
        if self.loss is None and are_few(tokens, self.weight):
            return *route(tokens, self.weight, self.topk), tokens
        if self.loss is None and _is_fused(tokens, self.weight):
            routed: tuple[Tensor, Tensor, Tensor] = _Route.apply(tokens, self.weight, self.topk)  # type: ignore[no-untyped-call]
            return routed
        logits = router_logits(tokens, self.weight)
        if self.loss is None:
            return *choose(logits, self.topk), tokens
        probs, experts = self.loss.attach(logits.softmax(dim=-1)).topk(self.topk, dim=-1)
        return probs / probs.sum(dim=-1, keepdim=True), experts, tokens


def _is_fused(tokens: Tensor, weight: Tensor) -> bool:
    """Return True for bf16 on GPUs, with a frozen weight."""
    is_bf16 = tokens.dtype is torch.bfloat16 and weight.dtype is torch.bfloat16
    return tokens.is_cuda and is_bf16 and not weight.requires_grad and tokens.numel() > 0


class _Route(torch.autograd.Function):
    """`router_logits` and `choose` as one node, whose gradient is one kernel, together with the other gradient of the
    tokens.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        from mixtral_run.model.kernels.routing import router_triton

        ctx.set_materialize_grads(False)
        probs, experts = router_triton.choose(torch.mm(tokens, weight.t(), out_dtype=torch.float32), topk)
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(probs, experts, weight)
        return probs, experts, tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None]:
        from mixtral_run.model.kernels.routing.router_triton import route_backward

        for_probs, _, for_tokens = gradients
        if for_probs is None:
            return for_tokens, None, None
        probs, experts, weight = ctx.saved_tensors
        rest = for_tokens.contiguous() if for_tokens is not None else None
        return route_backward(probs, experts, for_probs.contiguous(), weight.contiguous(), rest), None, None


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return tokens [tokens, hidden] · weightᵀ, summed in fp32: [tokens, experts]."""
    if _is_fused(tokens, weight):
        logits: Tensor = _RouterLogits.apply(tokens, weight)  # type: ignore[no-untyped-call]
        return logits
    return torch.nn.functional.linear(tokens.float(), weight.float())


class _RouterLogits(torch.autograd.Function):
    """Router logits without fp32 copies of the tokens.

    The product of two bf16 numbers is exact in fp32, and the sum is accumulated in fp32.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(tokens, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from mixtral_run.model.kernels.permute_triton import mix_rows

        (weight,) = ctx.saved_tensors
        return mix_rows(gradients[0].contiguous(), weight.contiguous()), None


def choose(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the probabilities of each token's `topk` likeliest experts, which sum to 1, and the experts, int64, both
    [tokens, topk], for logits [tokens, experts].
    """
    if logits.is_cuda and logits.dtype is torch.float32 and logits.numel():
        chosen: tuple[Tensor, Tensor] = _Choose.apply(logits, topk)  # type: ignore[no-untyped-call]
        return chosen
    probs, experts = logits.softmax(dim=-1).topk(topk, dim=-1)
    return probs / probs.sum(dim=-1, keepdim=True), experts


class _Choose(torch.autograd.Function):
    """`choose` in one kernel, and one for its gradient.

    The other experts cancel out of the renormalized probabilities: they are a softmax over the chosen logits.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        from mixtral_run.model.kernels.routing import router_triton

        probs, experts = router_triton.choose(logits.contiguous(), topk)
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(probs, experts)
        ctx.count = logits.shape[1]
        return probs, experts

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from mixtral_run.model.kernels.routing.router_triton import choose_backward

        probs, experts = ctx.saved_tensors
        return choose_backward(probs, experts, gradients[0].contiguous(), ctx.count), None


class MoELayer(MegatronModule):
    """Router, token dispatcher and experts of one layer.

    dispatcher: takes any routing of any number of tokens. A pass may be given another one.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        lora: LoraSettings | None,
        base_precision: str = "bf16",
        *,
        dispatcher: TokenDispatcher[Any],
    ) -> None:
        super().__init__(config)
        self.router = Router(config)
        self.experts = Experts(config, layer_number, lora, base_precision)
        self._dispatcher = dispatcher
        self._draws_numbers = lora is not None and lora.dropout > 0

    def forward(
        self,
        hidden: Tensor,
        recipe: Recipe | None = None,
        dispatcher: TokenDispatcher[Any] | None = None,
        *,
        num_chunks: int = 1,
        unread: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the layer's output for hidden [sequence (/ TP), batch, hidden], of the same shape.

        recipe: how to recompute `hidden` in the backward pass. dispatcher: of this pass; None for the layer's own.
        num_chunks: see expert_chunks.py, which saves `hidden` even if there is a recipe. unread: True if only the
        gradients of the output are wanted, as of a layer that runs again; its values are then arbitrary. residual: of
        the same shape, added to the output. All ranks of the expert group must call.
        """
        dispatcher = dispatcher or self._dispatcher
        tokens = hidden.reshape(-1, hidden.shape[-1])
        probs, experts, tokens = self.router(tokens)
        if num_chunks == 1:
            rest = residual.reshape(tokens.shape) if residual is not None else None
            routed = (tokens, probs, experts)
            return self._dispatched(dispatcher, *routed, recipe, unread=unread, residual=rest).view_as(hidden)

        def compute(tokens: Tensor, probs: Tensor, experts: Tensor) -> Tensor:
            # A chunk has gradients enabled only when it runs again for its backward pass.
            return self._dispatched(dispatcher, tokens, probs, experts, unread=torch.is_grad_enabled())

        outputs = in_chunks(
            compute, tokens, probs, experts, num_chunks, unread=unread, draws_numbers=self._draws_numbers
        )
        return added(residual, outputs.view_as(hidden))

    def _dispatched(
        self,
        dispatcher: TokenDispatcher[Any],
        tokens: Tensor,
        probs: Tensor,
        experts: Tensor,
        recipe: Recipe | None = None,
        *,
        unread: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Return the outputs [tokens, hidden] of the chosen experts, plus residual of the same shape if given. All
        ranks of the expert group must call.
        """
        if isinstance(dispatcher, LocalDispatcher) and self.experts.takes_one(tokens):
            return added(residual, self.experts.outputs_of_one(tokens, experts, probs))
        inputs, trip = dispatcher.dispatch(tokens, probs, experts, recipe=recipe, indexed=self.experts.adapted)
        outputs = self._compute(inputs, unread=unread)
        del inputs  # its memory is needed by the exchange
        return dispatcher.combine(outputs, trip, residual)

    def _compute(self, inputs: ExpertInputs, *, unread: bool) -> Tensor:
        if self.experts.adapted:
            # Where the experts do not give the probabilities their gradient, `combine` needs the outputs for it.
            unread = unread and inputs.probs is not None
            return self.experts.adapted_forward(
                inputs.tokens, inputs.permutation, inputs.recipe, inputs.probs, unread=unread
            )
        outputs: Tensor = self.experts(inputs.tokens, inputs.permutation.offsets, inputs.recipe, inputs.probs)
        return outputs


def unlimited_dispatcher(group: dist.ProcessGroup, num_experts: int) -> TokenDispatcher[Any]:
    """Return the dispatcher of an expert-parallel group that takes any routing of any number of tokens.

    It permutes tokens if this process has all experts, otherwise it exchanges them by all-to-all.
    """
    return LocalDispatcher(num_experts) if group.size() == 1 else AllToAllDispatcher(group, num_experts)
