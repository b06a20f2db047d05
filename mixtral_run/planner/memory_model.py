"""GPU and host memory that a LoRA run needs in each layout, computed before anything runs.

Standard library and sizes only. Each part is counted from the tensors that the code holds; docs/benchmarks.md compares
the figures with measured peaks. All sizes are bytes; `GIB` converts them to what nvidia-smi and torch report.
"""

from __future__ import annotations

import dataclasses
import math

from mixtral_run.config.context import MOST_LOGITS
from mixtral_run.config.lora import has_frozen_start, module_rank, shares_expert_adapters
from mixtral_run.config.recompute import RUNS_AGAIN
from mixtral_run.model.dispatch import capacity
from mixtral_run.model.kernels.requirements import QUANTIZED_AT_ONCE, QUANTIZING_BYTES
from mixtral_run.planner import policy
from mixtral_run.planner.workload import (
    GIB,
    Layout,
    Memory,
    Workload,
    adapter_parameters,
    trained_also_parameters,
    weight_bytes,
)

CONTEXT = 0.6 * GIB
"""CUDA context, kernel code and cuBLAS, which torch does not count."""
COMMUNICATION = 0.8 * GIB
"""NCCL's channels and buffers if there is more than one rank."""
ANOTHER_GROUP = 0.9 * GIB
"""NCCL's channels and buffers for each further process group that is used."""
LOSS_BYTES = 8
"""Per logit with Megatron's loss: bf16 value, fp32 exponential, and the gradient in the backward pass."""
LOSS_BYTES_WITHOUT_COPIES = 4
"""Per logit in bf16 with the whole vocabulary on one rank (model/kernels/loss): the value and its gradient."""
IMBALANCE = 1.1
"""Rows of the busiest rank over the mean if experts are spread over ranks."""
CAPTURE_OVERHEAD = 1.5 * GIB
"""Fragmentation in the pool of a CUDA graph that saves activations (train/steps/cuda_graph.py): 0.4 to 1.1 GiB."""
USABLE = 0.97
"""Usable part of a GPU's memory; the rest is lost to fragmentation in the allocator."""
USABLE_OF_HOST = 0.8
"""Part of a host's RAM that --recompute offload may pin; the rest is for the processes themselves."""

SAVED_TENSORS = {False: 3, True: 4}
"""Tensors of a checkpoint for each parameter: itself, AdamW's moments, and with a frozen start also that."""
EXPERT_BYTES = {"fp8": 1.0, "nf4": 0.5 + 2 / 64}
"""Bytes per expert weight: in 8 bit without its scales, which are counted apart; in 4 bit with its part of a scale."""


def execution(workload: Workload, layout: Layout) -> policy.Execution:
    """Return the token dispatch of the training pass, and whether the pass is captured as a CUDA graph."""
    shape = workload.architecture
    found = policy.execution_of(
        policy.TrainingPass(
            tokens=workload.tokens(layout) // layout.tensor_model_parallel_size,
            expert_size=layout.expert_model_parallel_size,
            recompute=layout.recompute,
            lora_dropout=workload.lora_dropout,
            fused_experts=workload.fused_experts,
            syncs_with_host=policy.products_sync_with_host(
                workload.compute_capability,
                workload.weight_bytes,
                shape.hidden_size,
                shape.ffn_hidden_size,
                module_rank(workload, "linear_fc1") * (2 if has_frozen_start(workload) else 1),
                kernels=workload.kernels,
            ),
            peer_access=workload.peer_access
            and policy.has_peer_access(layout.expert_model_parallel_size, workload.gpus, workload.gpus_per_host),
            expert_chunks=layout.expert_chunks,
        )
    )
    return found if workload.cuda_graphs else dataclasses.replace(found, captured=False)


def fit_dispatch(workload: Workload, layout: Layout, limit: float) -> Workload:
    """Return the workload, without peer access if it needs more than `limit` bytes and less that way."""
    if memory(workload, layout).total <= limit:
        return workload
    without = dataclasses.replace(workload, peer_access=False)
    return min(workload, without, key=lambda each: memory(each, layout).total)


def _rows_over_mean(workload: Workload, layout: Layout) -> float:
    """Return the number of rows that a rank has memory for over the rows of its own tokens."""
    size = layout.expert_model_parallel_size
    if size == 1:
        return 1.0
    fixed = execution(workload, layout).dispatch.has_fixed_shapes
    return min(size, capacity.spare(size)) if fixed else IMBALANCE


def memory(workload: Workload, layout: Layout) -> Memory:
    """Return the bytes of one GPU at the peak of a run: at the loss, or in the last layer's backward pass.

    If loading needs more than that, as with few layers and short rows, the buffers are those of loading.
    """
    training = _training_memory(workload, layout)
    weights_and_context = training.weights + training.context
    more = loading_bytes(workload, layout) - (training.total - weights_and_context)
    return dataclasses.replace(training, buffers=training.buffers + more) if more > 0 else training


def loading_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes that loading needs besides the weights: the adapters, and buffers of quantizing.

    A base in 16 bit is read into its place. Experts in 8 or 4 bit are quantized when everything else is loaded, one
    linear layer at a time, from a buffer that holds the largest one (MixtralModel.quantize_experts).
    """
    shape = workload.architecture
    starts = 2 if has_frozen_start(workload) else 1
    held = 4 * (adapter_parameters(workload, layout) * starts + trained_also_parameters(workload, layout))
    if workload.expert_bytes >= workload.weight_bytes:
        return held
    of_expert = 2 * shape.ffn_hidden_size * shape.hidden_size
    buffer = shape.num_experts / layout.expert_model_parallel_size * of_expert * workload.weight_bytes
    return held + buffer + max(QUANTIZING_BYTES.values()) * min(of_expert, QUANTIZED_AT_ONCE)


def _training_memory(workload: Workload, layout: Layout) -> Memory:
    adapters = adapter_parameters(workload, layout)
    also = trained_also_parameters(workload, layout)
    activations, buffers = _peak_of_layers(workload, layout)
    return Memory(
        weights=weight_bytes(workload, layout),
        # The base has fp32 in place of its own dtype, and a copy of that where it is used.
        adapters=adapters * _bytes_per_adapter_parameter(workload, layout) + _repeated(workload, layout) + also * 4,
        gradients=(adapters + also) * 4,
        optimizer=(adapters + also) * 8,
        activations=activations,
        buffers=buffers + _evaluation_buffers(workload, layout),
        context=CONTEXT + _communication(workload, layout),
    )


def _peak_of_layers(workload: Workload, layout: Layout) -> tuple[float, float]:
    """Return the bytes of the layers' activations and of temporary tensors at the peak of a step.

    Layers behind those that run again store their activations until their backward pass, which comes first. The peak is
    there, or later when a layer runs again.
    """
    tokens, count = workload.tokens(layout), layout.layers_again(workload.architecture.num_layers)
    stored = workload.architecture.num_layers - count
    if layout.recompute == "offload":
        # The input of the layer that is recomputed, and that of the next layer, which is being copied.
        count = min(count, 2)
    activations = count * tokens * activation_bytes_per_token(workload, layout)
    again = activations, _buffers(workload, layout)
    if stored == 0:
        return again
    captured = dataclasses.replace(workload, cuda_graphs=execution(workload, layout).captured)
    behind = dataclasses.replace(layout, recompute="selective", recompute_layers=None)
    activations += stored * tokens * activation_bytes_per_token(workload, behind)
    return max(again, (activations, _buffers(captured, behind)), key=sum)


def _stored_part(workload: Workload, layout: Layout) -> float:
    """Return the part of the layers that do not run again."""
    if layout.recompute not in RUNS_AGAIN:
        return 1.0
    count = workload.architecture.num_layers
    return 1 - layout.layers_again(count) / count


def _bytes_per_adapter_parameter(workload: Workload, layout: Layout) -> float:
    """Return the bytes of a trained parameter, and of its frozen start if it has one."""
    # fp32, and the bf16 copies that the backward pass needs unless the layer is recomputed.
    each = 4 + 2 * _stored_part(workload, layout)
    return 2 * each if has_frozen_start(workload) else each


def _repeated(workload: Workload, layout: Layout) -> float:
    """Return the bytes of the copies of an adapter that experts share: the products want one for each local expert."""
    if not shares_expert_adapters(workload):
        return 0.0
    each = dataclasses.replace(workload, expert_adapters="each")
    more = adapter_parameters(each, layout) - adapter_parameters(workload, layout)
    return 2 * _stored_part(workload, layout) * more


def host_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of RAM that a host pins: with --recompute offload, the inputs of all layers of its GPUs."""
    if layout.recompute != "offload":
        return 0.0
    shape = workload.architecture
    # torch pins blocks of powers of two.
    block = 1 << (math.ceil(workload.tokens(layout) * activation_bytes_per_token(workload, layout)) - 1).bit_length()
    return float(min(workload.gpus, workload.gpus_per_host) * layout.layers_again(shape.num_layers) * block)


def saved_copy_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of RAM of a host that a save in the background copies: adapters and AdamW's moments, in fp32.

    Each parameter is in the copy of one rank of the job. With several hosts it is at most this much on one of them.
    """
    whole, also = (
        workload.architecture.num_adapter_parameters(workload),
        workload.architecture.num_trained_also(workload.train_also),
    )
    gpus = min(workload.gpus, workload.gpus_per_host)
    on_host = adapter_parameters(workload, layout) * gpus
    also_on_host = min(also, trained_also_parameters(workload, layout) * gpus)
    return SAVED_TENSORS[has_frozen_start(workload)] * 4 * min(whole, on_host) + 3 * 4 * also_on_host


def activation_bytes_per_token(workload: Workload, layout: Layout) -> float:
    """Return the bytes that a layer saves for the backward pass, per token of the micro batch.

    none: the inputs of both norms; the inputs of the adapters of qkv and fc1; query, key, value, context; fc1's output;
    if the experts are not fused, also the activation and fc2's output. selective: without what norm, activation and
    permutation recompute. full and offload: the layer's input; except-attention: also attention's result and
    log-sum-exp. Layers behind those that run again (recompute_layers) do not count.
    """
    tp = layout.tensor_model_parallel_size
    residual = _row_bytes(workload, workload.architecture.hidden_size) / tp
    if layout.recompute in RUNS_AGAIN:
        return residual + (_attention_result(workload) / tp if layout.recompute == "except-attention" else 0.0)
    # A trained router keeps its input in fp32, for the gradient of its weight.
    copied = "router" in workload.train_also and workload.weight_bytes < 4
    routed = 4 * workload.architecture.hidden_size / tp if copied else 0.0
    return 2 * residual + _attention_per_token(workload, layout) + _experts_per_token(workload, layout) + routed


def _attention_result(workload: Workload) -> float:
    """Return the bytes of a token's attention over all heads: its result, and its log-sum-exp in fp32."""
    shape = workload.architecture
    return _row_bytes(workload, shape.projection_size) + 4 * shape.num_attention_heads


def _row_bytes(workload: Workload, columns: float) -> float:
    return columns * workload.weight_bytes


def _attention_per_token(workload: Workload, layout: Layout) -> float:
    shape, tp = workload.architecture, layout.tensor_model_parallel_size
    adapted, dropped = workload.lora_target_modules, workload.lora_dropout > 0
    normed = _row_bytes(workload, shape.hidden_size) if "linear_qkv" in adapted and layout.recompute == "none" else 0.0
    context = _row_bytes(workload, shape.projection_size)
    saved = normed + _row_bytes(workload, shape.qkv_size) + _attention_result(workload)
    if layout.context_parallel_size > 1:
        # Keys and values of the other ranks (model/attention/context_attention.py).
        saved += (layout.context_parallel_size - 1) * keys_and_values(workload)
    if "linear_proj" in adapted and layout.recompute == "none" and (workload.rows > 1 or dropped):
        # The adapter reads a copy: transposed from samples first to positions first, or with dropout applied.
        saved += context
    if dropped:
        # The masks, a byte an element.
        saved += shape.hidden_size * ("linear_qkv" in adapted) + shape.projection_size * ("linear_proj" in adapted)
    return saved / tp


def keys_and_values(workload: Workload) -> float:
    """Return the bytes of the keys and values of a token, over all heads."""
    return _row_bytes(workload, workload.architecture.qkv_size - workload.architecture.projection_size)


def _experts_per_token(workload: Workload, layout: Layout) -> float:
    shape, size = workload.architecture, layout.expert_model_parallel_size
    adapted, dropped, fused = workload.lora_target_modules, workload.lora_dropout > 0, workload.fused_experts
    local, selective = size == 1, layout.recompute == "selective"
    hidden, ffn = _row_bytes(workload, shape.hidden_size), _row_bytes(workload, shape.ffn_hidden_size)
    # model/adapters/lora_experts.py recomputes the activation in the backward pass, reads rows through their tokens,
    # and computes the router's gradient without outputs.
    once = hidden if fused and local and not selective else 0.0
    # Rows that came from other ranks cannot be gathered again without another exchange.
    rows = hidden if "linear_fc1" in adapted and not (local and (selective or fused)) else 0.0
    active = ffn if "linear_fc2" in adapted and not selective and not fused else 0.0
    no_output = (local and (selective or fused)) or execution(workload, layout).dispatch.has_fixed_shapes
    saved = rows + 2 * ffn + active + (0.0 if no_output else hidden)
    if dropped:
        saved += shape.hidden_size * ("linear_fc1" in adapted) + shape.ffn_hidden_size * ("linear_fc2" in adapted)
    rows_over_mean = _rows_over_mean(workload, layout)
    return (once + shape.moe_router_topk * saved * rows_over_mean) / layout.tensor_model_parallel_size


def _buffers(workload: Workload, layout: Layout) -> float:
    """Return the larger of the temporary bytes of the loss and of one layer's backward pass."""
    shape, tp, tokens = workload.architecture, layout.tensor_model_parallel_size, workload.tokens(layout)
    layer = _expert_buffers(workload, layout)
    if layout.expert_chunks > 1:
        layer += tokens * _row_bytes(workload, shape.hidden_size) / tp
    if layout.expert_chunks > 1 or layout.context_parallel_size > 1:
        layer = max(layer, _attention_buffers(workload, layout))
    if layout.recompute in RUNS_AGAIN:
        layer += _activations_of_layer(workload, layout)
    elif execution(workload, layout).captured:
        layer += CAPTURE_OVERHEAD
    return max(_loss_bytes(workload, layout), layer)


def _expert_buffers(workload: Workload, layout: Layout) -> float:
    """Return the temporary bytes of the backward pass of a layer's experts, or of a chunk of their tokens."""
    shape, tp, tokens = workload.architecture, layout.tensor_model_parallel_size, workload.expert_tokens(layout)
    local = layout.expert_model_parallel_size == 1
    rows = shape.moe_router_topk * tokens * _rows_over_mean(workload, layout) / tp
    # Gradients of fc1's output and of the activation, and of the rows on both sides of the exchange.
    found = rows * (
        _row_bytes(workload, 3 * shape.ffn_hidden_size) + _row_bytes(workload, shape.hidden_size) * (2 if local else 4)
    )
    if execution(workload, layout).dispatch.has_fixed_shapes:
        # Buffers that other ranks read: this rank's tokens, and its experts' rows.
        found += (workload.tokens(layout) / tp + rows) * _row_bytes(workload, shape.hidden_size)
    # The recomputed activation.
    found += rows * _row_bytes(workload, shape.ffn_hidden_size)
    if layout.recompute == "selective":
        found += rows * _row_bytes(workload, shape.hidden_size)
    if workload.expert_bytes < 1 or (
        workload.expert_bytes == 1 and not policy.multiplies_in_8_bit(workload.compute_capability, workload.kernels)
    ):
        # The experts of one linear layer in 16 bit, for the product.
        found += shape.num_experts * 4 * shape.ffn_hidden_size * shape.hidden_size / layout.expert_model_parallel_size
    elif workload.expert_bytes == 1:
        # The larger input in 8 bit.
        found += rows * 2 * shape.ffn_hidden_size
    return found


def _attention_buffers(workload: Workload, layout: Layout) -> float:
    """Return the temporary bytes of the backward pass of a layer's attention, which experts in chunks may undercut.

    Gradients of its output projection's input, of queries, keys and values, and of linear_qkv's output; under TP also
    the whole sequence of its input and of its gradient.
    """
    shape, tp, size = workload.architecture, layout.tensor_model_parallel_size, layout.context_parallel_size
    queries = _row_bytes(workload, shape.projection_size)
    each = (queries + 2 * _row_bytes(workload, shape.qkv_size)) / tp
    gathered = 2 * _row_bytes(workload, shape.hidden_size) if tp > 1 else 0.0
    # The gradient of linear_qkv's output in 8 bit.
    small = shape.qkv_size / tp if workload.attention_precision == "fp8" else 0.0
    tokens = workload.tokens(layout)
    if size == 1:
        return tokens * (each + gathered + small)
    # Of a chunk, half of the tokens: the gradient of its queries in fp32; of the keys and values of the row: gradients
    # for each head, their sums over the heads that share them, and those of the other chunk.
    row = 2 * queries + 2 * keys_and_values(workload)
    return tokens * (each + gathered + small + shape.projection_size * 4 / 2 / tp + size * row / tp)


def _activations_of_layer(workload: Workload, layout: Layout) -> float:
    """Return the bytes of what a layer that runs again keeps for its backward pass, besides what it had kept."""
    stored = dataclasses.replace(layout, recompute="none")
    tokens = workload.tokens(layout)
    whole = activation_bytes_per_token(workload, stored)
    if layout.recompute == "except-attention":
        whole -= _attention_result(workload) / layout.tensor_model_parallel_size
    if layout.expert_chunks == 1:
        return tokens * whole
    of_experts = _experts_per_token(workload, stored)
    others = whole - of_experts
    # All inputs of the experts, the layer's output, and its gradient.
    others += 3 * _row_bytes(workload, workload.architecture.hidden_size) / layout.tensor_model_parallel_size
    return tokens * others + workload.expert_tokens(layout) * of_experts


def _loss_bytes(workload: Workload, layout: Layout) -> float:
    """Return the temporary bytes of the loss: logits of a chunk of tokens (model/chunked_loss.py), and the tokens' own
    hidden states and their gradients, which are whole on each TP rank.
    """
    shape, tp, tokens = workload.architecture, layout.tensor_model_parallel_size, workload.tokens(layout)
    each = LOSS_BYTES_WITHOUT_COPIES if tp == 1 and workload.weight_bytes == 2 else LOSS_BYTES
    logits = min(tokens, MOST_LOGITS) * shape.padded_vocab_size(tp) * each / tp
    return logits + (2 * tokens * _row_bytes(workload, shape.hidden_size) if tokens > MOST_LOGITS else 0.0)


def _evaluation_buffers(workload: Workload, layout: Layout) -> float:
    """Return the bytes that evaluating the validation set adds to training.

    An eager training pass frees its memory meanwhile. A captured one holds it, so that the forward pass of the
    evaluation, which uses the all-to-all dispatch, needs its own: the loss and one layer's experts, both, because the
    allocator cannot reuse the blocks of one for the other.
    """
    if not (workload.has_validation and execution(workload, layout).captured):
        return 0.0
    shape, tp, ep = workload.architecture, layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    loss = _loss_bytes(workload, layout)
    rows = shape.moe_router_topk * workload.tokens(layout) * (1.0 if ep == 1 else IMBALANCE) / tp
    layer = rows * (_row_bytes(workload, 3 * shape.ffn_hidden_size) + _row_bytes(workload, shape.hidden_size) * 4)
    if workload.expert_bytes < 1:
        layer += shape.num_experts * 4 * shape.ffn_hidden_size * shape.hidden_size / ep
    return loss + layer


def _communication(workload: Workload, layout: Layout) -> float:
    if workload.gpus == 1:
        return 0.0
    # The evaluation uses all-to-all, training another exchange with its own communicator.
    further = workload.has_validation and execution(workload, layout).dispatch.has_fixed_shapes
    # The ranks of a row gather keys and values; if they are all ranks, in the group that also sums the gradients.
    gathers = 1 < layout.context_parallel_size < workload.gpus
    return COMMUNICATION + (further + gathers) * ANOTHER_GROUP
