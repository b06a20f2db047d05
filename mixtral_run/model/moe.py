"""The mixture-of-experts layer: route, send tokens to their experts' processes, compute, bring them back.

As in HF's Mixtral: softmax over all experts in fp32, the top k kept and renormalized. With sequence parallelism each TP
rank routes its own part of the sequence; experts are whole (ETP 1) and spread over EP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixtral_run.model.dispatch.all_gather import Room, gather, sum_where_they_belong
from mixtral_run.model.dispatch.permute import regroup, sorted_by_expert, to_rows, to_tokens
from mixtral_run.model.dispatch.symmetric_memory import Peers
from mixtral_run.model.experts import Experts
from mixtral_run.model.lora_experts import Rows
from mixtral_run.model.lora_settings import LoraSettings
from mixtral_run.model.parallel.megatron import MegatronModule, TransformerConfig, all_to_all, parallel_state
from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.model.recompute.recipe import Recipe


class Router(MegatronModule):
    """Picks the experts of each token. weight: [experts, hidden]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        self.topk: int = config.moe_router_topk
        self.weight = torch.nn.Parameter(
            torch.empty(
                config.num_moe_experts,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        mark(self.weight, partial=config.sequence_parallel)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens: [tokens, hidden] → weights fp32 and expert numbers int64, both [tokens, topk]; weights sum to 1.

        In fp32 throughout: in bf16 a near tie sends a token to another expert, which dominates the model's error.
        """
        logits = router_logits(tokens, self.weight)
        weights, experts = logits.softmax(dim=-1).topk(self.topk, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), experts


def router_logits(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [tokens, hidden] · weightᵀ, summed in fp32: [tokens, experts]."""
    if tokens.is_cuda and tokens.dtype is torch.bfloat16 and not weight.requires_grad and tokens.numel():
        logits: Tensor = _RouterLogits.apply(tokens, weight)  # type: ignore[no-untyped-call]
        return logits
    return torch.nn.functional.linear(tokens.float(), weight.float())


class _RouterLogits(torch.autograd.Function):
    """Without fp32 copies of the tokens: products of bf16 numbers are exact in fp32, which is what is added up."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.mm(tokens, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        from mixtral_run.model.kernels.permute_triton import mix_rows

        (weight,) = ctx.saved_tensors
        return mix_rows(gradients[0].contiguous(), weight.contiguous()), None


class MoELayer(MegatronModule):
    """Router and experts of one layer."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        lora: LoraSettings | None,
        base_precision: str = "bf16",
        **_: Any,
    ) -> None:
        super().__init__(config)
        self.num_experts: int = config.num_moe_experts
        self.router = Router(config)
        self.experts = Experts(config, layer_number, lora, base_precision)
        self.expert_group = parallel_state.get_expert_model_parallel_group()
        self.room: Room | None = None
        """Where given, experts spread over processes get their tokens as all_gather.py has it."""

    def forward(self, hidden: Tensor, recipe: Recipe | None = None) -> Tensor:
        """hidden: [sequence (/ TP), batch, hidden]; returns the same shape. All ranks of the expert group must call.

        recipe: of hidden, when what is cheap shall be computed again in the backward pass.
        """
        tokens = hidden.reshape(-1, hidden.shape[-1])
        weights, experts = self.router(tokens)
        if self.room is not None and self.expert_group.size() > 1:
            if self.room.peers is not None:
                return self._read(tokens, weights, experts, self.room, self.room.peers).view_as(hidden)
            return self._gathered(tokens, weights, experts, self.room).view_as(hidden)
        topk = experts.shape[1]
        order, position, ends = sorted_by_expert(experts.flatten(), self.num_experts)
        if self.expert_group.size() > 1:
            rows = to_rows(tokens, order, position, topk)
            outputs = self._through_expert_group(rows, ends, selective=recipe is not None)
        elif self.experts.adapted or recipe is not None:
            outputs = self._by_shares(tokens, weights, order, position, ends, recipe)
            # The weights have their gradient by their shares; detached, the outputs need not be kept for it.
            weights = weights.detach()
        else:
            outputs = self.experts(to_rows(tokens, order, position, topk), ends)
        return to_tokens(outputs, weights, order, position).view_as(hidden)

    def _by_shares(
        self,
        tokens: Tensor,
        weights: Tensor,
        order: Tensor,
        position: Tensor,
        ends: Tensor,
        recipe: Recipe | None,
    ) -> Tensor:
        """The outputs where all experts are here; the router's weights have their gradient by their shares."""
        topk = weights.shape[1]
        shares = weights.flatten().index_select(0, order)
        source = order // topk
        if self.experts.adapted:
            return self.experts.adapted_forward(tokens, Rows(ends, source, position, topk), recipe, shares)
        assert recipe is not None
        width = tokens.shape[-1]
        recipe = recipe.then(lambda made, by: made.reshape(-1, width).index_select(0, by), source)
        outputs: Tensor = self.experts(to_rows(tokens, order, position, topk), ends, recipe, shares)
        return outputs

    def _gathered(self, tokens: Tensor, weights: Tensor, experts: Tensor, room: Room) -> Tensor:
        """Each process adds up what its experts say of all tokens; see all_gather.py. Trains adapted experts alone."""
        size, topk = self.expert_group.size(), experts.shape[1]
        count = self.num_experts // size
        everyones = gather(tokens, weights, experts, self.expert_group)
        chosen = everyones.experts.flatten() - self.expert_group.rank() * count
        # Those of other processes come last.
        chosen = torch.where((chosen >= 0) & (chosen < count), chosen, count)
        order, position, ends = sorted_by_expert(chosen, count + 1)
        num_rows = room.num_rows(chosen.numel(), size)
        ends = room.bound(ends[:count], num_rows)
        order, end = order[:num_rows], ends[-1:]
        mesh = torch.arange(num_rows, device=order.device) < end
        shares = everyones.weights.flatten().index_select(0, order).where(mesh, 0.0)
        if self.experts.adapted:
            rows = Rows(ends, order // topk, position, topk, partial=True)
            outputs = self.experts.adapted_forward(everyones.tokens, rows, None, shares)
        else:
            outputs = self.experts(everyones.tokens.index_select(0, order // topk), ends)
        parts = to_tokens(outputs, everyones.weights.detach().contiguous(), order, position, end)
        return sum_where_they_belong(parts, self.expert_group)

    def _read(self, tokens: Tensor, weights: Tensor, experts: Tensor, room: Room, peers: Peers) -> Tensor:
        """Each process reads the rows of its experts, and what these say of its tokens; see symmetric_memory.py.
        Trains adapted
        experts alone."""
        num_rows = room.num_rows(experts.numel() * peers.size, peers.size)
        routes = peers.route(tokens, weights, experts, num_rows, room.missing)
        rows, shares = peers.rows(tokens, weights, routes)
        outputs = self.experts.adapted_forward(rows, Rows(routes.ends), None, shares)
        return peers.sum_where_they_belong(outputs, weights.detach(), routes)

    def _through_expert_group(self, rows: Tensor, ends: Tensor, *, selective: bool) -> Tensor:
        """Rows sorted by expert → their experts' outputs in the same order. ends: int32 [experts], of this process."""
        size = self.expert_group.size()
        counts = torch.diff(ends, prepend=torch.zeros_like(ends[:1]))
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self.expert_group)
        # [sender or receiver, local expert]; one copy to the host for both.
        sent, received = torch.stack((counts, incoming)).view(2, size, -1).tolist()
        send_sizes, receive_sizes = [sum(each) for each in sent], [sum(each) for each in received]
        arrived = all_to_all(self.expert_group, rows, receive_sizes, send_sizes)
        blocks, local = [count for each in received for count in each], len(received[0])
        # As they arrived, by sender and expert; and as the experts take them, by expert and sender.
        there = [sender * local + expert for expert in range(local) for sender in range(size)]
        back = [expert * size + sender for sender in range(size) for expert in range(local)]
        arrived = regroup(arrived, blocks, there)
        ends = incoming.view(size, -1).sum(0).cumsum(0).int()
        if self.experts.adapted:
            outputs = self.experts.adapted_forward(arrived, Rows(ends))
        else:
            # Gathering them again would mean asking the other processes again.
            outputs = self.experts(arrived, ends, Recipe.kept(arrived) if selective else None)
        outputs = regroup(outputs, [blocks[block] for block in there], back)
        returned: Tensor = all_to_all(self.expert_group, outputs, send_sizes, receive_sizes)
        return returned
