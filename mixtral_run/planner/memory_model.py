"""What a LoRA run takes of a GPU's memory in each layout, before anything runs. Standard library and sizes only.

Each part is counted from the tensors that the code keeps; docs/benchmarks.md has the figures beside measured peaks.
Bytes throughout; `GIB` turns them into what nvidia-smi and torch report.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from mixtral_run.config.verbs import LORA_TARGET_MODULES, RECOMPUTE, RUNS_AGAIN
from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture
from mixtral_run.model.dispatch import capacity

GIB = 1024**3
CONTEXT = 0.6 * GIB
"""CUDA context, kernels' code and cuBLAS, outside of torch's own count."""
COMMUNICATION = 0.8 * GIB
"""NCCL's channels and buffers, where there is more than one process."""
ANOTHER_GROUP = 0.9 * GIB
"""The same of each further group of processes that is used."""
LOSS_BYTES = 8
"""A logit's: bf16, fp32 exponentials, and the gradient on its way back."""
IMBALANCE = 1.1
"""Rows of the busiest process over the mean, where experts are spread over processes."""
RECORDED = 1.5 * GIB
"""Lost between the blocks of a recorded pass (train/cuda_graph.py) that keeps activations; 0.4 to 1.1 were found."""
USABLE = 0.97
"""Of a GPU's memory; the rest is lost between the allocator's blocks."""
USABLE_OF_HOST = 0.8
"""Of a host's RAM, for what --recompute offload pins there; the rest is for the processes themselves."""
GPUS_PER_HOST = 8
RATE_BY_TOKENS = ((512, 0.70), (2048, 1.0), (8192, 1.14))
"""Tokens that all experts share, and the rate against 2,048: the more, the fuller their products. Rows of 2,048 tokens
and less, one H200, bf16."""
WORTH_TELLING = 1.05


EXPERT_BYTES = {"fp8": 1.0, "nf4": 0.5 + 2 / 64}
"""Of an expert's weight in 8 bit, whose scales are counted apart, and in 4 bit with its share of a scale."""


@dataclass(frozen=True)
class Layout:
    """How the model is split, and how much is computed again."""

    tensor_model_parallel_size: int
    expert_model_parallel_size: int
    recompute: str

    def __str__(self) -> str:
        return f"TP{self.tensor_model_parallel_size}/EP{self.expert_model_parallel_size}"

    def flags(self) -> str:
        return (
            f"--tensor-model-parallel-size {self.tensor_model_parallel_size} "
            f"--expert-model-parallel-size {self.expert_model_parallel_size} --recompute {self.recompute}"
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, and on how many GPUs. weight_bytes: of a base weight; expert_bytes: of an expert's; recorded: as
    far as the layout allows it (train/cuda_graph.py); reads: GPUs read rows from each other
    (model/dispatch/symmetric_memory.py), for which
    there is room for twice the mean; validates: pairs kept back are looked at in between (train/validation.py)."""

    architecture: MixtralArchitecture = MIXTRAL_8X7B
    gpus: int = 8
    seq_length: int = 512
    micro_batch_size: int = 1
    lora_rank: int = 16
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = LORA_TARGET_MODULES
    weight_bytes: int = 2
    expert_bytes: float = 2
    gpus_per_host: int = GPUS_PER_HOST
    recorded: bool = True
    reads: bool = True
    validates: bool = False

    @property
    def as_one(self) -> bool:
        """Whether both layers of the experts are one step backward (model/lora_experts.py)."""
        return {"linear_fc1", "linear_fc2"} <= set(self.lora_target_modules) and self.lora_dropout == 0

    @property
    def tokens(self) -> int:
        """Tokens of one micro batch."""
        return self.seq_length * self.micro_batch_size


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest GPU, by part."""

    weights: float
    adapters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    context: float

    @property
    def total(self) -> float:
        return float(sum(dataclasses.astuple(self)))

    @property
    def allocated(self) -> float:
        """What torch counts: all but the context, which the driver and NCCL hold."""
        return self.total - self.context


@dataclass(frozen=True)
class Choice:
    """A layout judged: relative_speed is against one GPU that holds everything and recomputes nothing.

    host_bytes: of RAM, on each host; see the function of that name.
    """

    layout: Layout
    memory: Memory
    host_bytes: float
    fits: bool
    relative_speed: float


def is_recorded(workload: Workload, layout: Layout) -> bool:
    """Whether the pass over a micro batch is recorded, as far as sizes tell (train/cuda_graph.py)."""
    runs_again = layout.recompute in RUNS_AGAIN
    return (
        workload.recorded
        and workload.weight_bytes == 2
        and not (runs_again and (layout.recompute == "offload" or workload.lora_dropout > 0))
        and (layout.expert_model_parallel_size == 1 or gathers(workload, layout))
    )


def gathers(workload: Workload, layout: Layout) -> bool:
    """Whether experts in several processes get their rows without asking the host
    (model/dispatch/symmetric_memory.py; where GPUs do not
    read from each other, model/dispatch/all_gather.py, up to fewer tokens), as far as sizes tell."""
    tokens = workload.tokens // layout.tensor_model_parallel_size
    pays = capacity.pays(tokens, layout.expert_model_parallel_size, read=workload.reads)
    return pays and workload.as_one and workload.weight_bytes == 2


def within(workload: Workload, layout: Layout, most: float) -> Workload:
    """The workload; where it takes more than `most` bytes, without GPUs that read from each other, if that is less."""
    if memory(workload, layout).total <= most:
        return workload
    asking = dataclasses.replace(workload, reads=False)
    return min(workload, asking, key=lambda each: memory(each, layout).total)


def _rows_over_mean(workload: Workload, layout: Layout) -> float:
    """Rows that a process has memory for, over those of its tokens."""
    size = layout.expert_model_parallel_size
    if size == 1:
        return 1.0
    return min(size, capacity.spare(size)) if gathers(workload, layout) else IMBALANCE


def memory(workload: Workload, layout: Layout) -> Memory:
    """What one GPU holds at the peak of a step, which is at the loss or in the backward pass of the last layer."""
    adapters = adapter_parameters(workload, layout)
    layers = workload.architecture.num_layers
    if layout.recompute == "offload":
        # The input of the layer that runs again, and that of the next on its way.
        layers = min(layers, 2)
    return Memory(
        weights=weight_bytes(workload, layout),
        # fp32, and the bf16 copies that the backward pass needs where the layer does not run again.
        adapters=adapters * (4 if layout.recompute in RUNS_AGAIN else 6),
        gradients=adapters * 4,
        optimizer=adapters * 8,
        activations=layers * workload.tokens * kept_per_token(workload, layout),
        buffers=_buffers(workload, layout) + _beside_recorded(workload, layout),
        context=CONTEXT + _communication(workload, layout),
    )


def host_bytes(workload: Workload, layout: Layout) -> float:
    """What the GPUs of one host pin of its RAM: with --recompute offload, the inputs of their layers."""
    if layout.recompute != "offload":
        return 0.0
    shape = workload.architecture
    # torch pins blocks of powers of two.
    block = 1 << (math.ceil(workload.tokens * kept_per_token(workload, layout)) - 1).bit_length()
    return float(min(workload.gpus, workload.gpus_per_host) * shape.num_layers * block)


def weight_bytes(workload: Workload, layout: Layout) -> float:
    """Frozen weights: attention, embeddings and output layer split over TP, experts over EP, the rest everywhere."""
    shape = workload.architecture
    hidden = shape.hidden_size
    experts = shape.num_layers * shape.num_experts * 3 * hidden * shape.ffn_hidden_size
    split = shape.num_layers * hidden * (shape.qkv_size + shape.projection_size) + 2 * shape.vocab_size * hidden
    whole = shape.num_parameters - experts - split
    dense = (split / layout.tensor_model_parallel_size + whole) * workload.weight_bytes
    expert_bytes: float = workload.expert_bytes
    if workload.expert_bytes == 1:
        # A scale, fp32, for each output channel.
        expert_bytes += 4 * (2 * shape.ffn_hidden_size + hidden) / (3 * hidden * shape.ffn_hidden_size)
    return dense + experts * expert_bytes / layout.expert_model_parallel_size


def adapter_parameters(workload: Workload, layout: Layout) -> float:
    """Adapter parameters on one GPU (model/lora.py and model/experts.py say what is split)."""
    shape, tp = workload.architecture, layout.tensor_model_parallel_size
    hidden, ffn, ep = shape.hidden_size, shape.ffn_hidden_size, layout.expert_model_parallel_size
    sizes = {
        "linear_qkv": hidden + shape.qkv_size / tp,
        "linear_proj": shape.projection_size / tp + hidden,
        "linear_fc1": shape.num_experts * (hidden + 2 * ffn) / ep,
        "linear_fc2": shape.num_experts * (ffn + hidden) / ep,
    }
    return shape.num_layers * workload.lora_rank * sum(sizes[name] for name in workload.lora_target_modules)


def kept_per_token(workload: Workload, layout: Layout) -> float:
    """Bytes that a layer keeps for the backward pass, per token of the micro batch.

    none: the inputs of both norms; what the adapters of qkv and fc1 read; query, key, value, context; fc1's output;
    where the experts are not one step backward, the activation and fc2's output too. selective: without what norm,
    activation and permutation make again. full and offload: its input.
    """
    tp = layout.tensor_model_parallel_size
    residual = _width(workload, workload.architecture.hidden_size) / tp
    if layout.recompute in RUNS_AGAIN:
        return residual
    return 2 * residual + _attention_per_token(workload, layout) + _experts_per_token(workload, layout)


def _width(workload: Workload, columns: float) -> float:
    return columns * workload.weight_bytes


def _attention_per_token(workload: Workload, layout: Layout) -> float:
    shape, tp = workload.architecture, layout.tensor_model_parallel_size
    adapted, dropped = workload.lora_target_modules, workload.lora_dropout > 0
    normed = _width(workload, shape.hidden_size) if "linear_qkv" in adapted and layout.recompute == "none" else 0.0
    context = _width(workload, shape.projection_size)
    kept = normed + _width(workload, shape.qkv_size) + context + 4 * shape.num_attention_heads
    if "linear_proj" in adapted and layout.recompute == "none" and (workload.micro_batch_size > 1 or dropped):
        # Its adapter reads a copy: turned from samples first to positions first, or with dropout.
        kept += context
    if dropped:
        kept += shape.hidden_size * ("linear_qkv" in adapted) + shape.projection_size * ("linear_proj" in adapted)
    return kept / tp


def _experts_per_token(workload: Workload, layout: Layout) -> float:
    shape, size = workload.architecture, layout.expert_model_parallel_size
    adapted, dropped, as_one = workload.lora_target_modules, workload.lora_dropout > 0, workload.as_one
    alone, again = size == 1, layout.recompute == "selective"
    hidden, ffn = _width(workload, shape.hidden_size), _width(workload, shape.ffn_hidden_size)
    # model/lora_experts.py makes the activation on its way back, reads rows through their tokens, and gives the
    # router its gradient without outputs.
    once = hidden if as_one and alone and not again else 0.0
    # Rows that came from other processes cannot be gathered again without asking them.
    rows = hidden if "linear_fc1" in adapted and not (alone and (again or as_one)) else 0.0
    active = ffn if "linear_fc2" in adapted and not again and not as_one else 0.0
    output = 0.0 if (alone and (again or as_one)) or gathers(workload, layout) else hidden
    kept = rows + 2 * ffn + active + output
    if dropped:
        kept += shape.hidden_size * ("linear_fc1" in adapted) + shape.ffn_hidden_size * ("linear_fc2" in adapted)
    rows_over_mean = _rows_over_mean(workload, layout)
    return (once + shape.moe_router_topk * kept * rows_over_mean) / layout.tensor_model_parallel_size


def _buffers(workload: Workload, layout: Layout) -> float:
    """The larger of what the loss and what a layer's backward pass need beside what is kept."""
    shape, tp, tokens = workload.architecture, layout.tensor_model_parallel_size, workload.tokens
    alone = layout.expert_model_parallel_size == 1
    loss = tokens * shape.vocab_size * LOSS_BYTES / tp
    rows = shape.moe_router_topk * tokens * _rows_over_mean(workload, layout) / tp
    # Gradients of fc1's output and of the activation, and of the rows on both sides of the exchange.
    layer = rows * (
        _width(workload, 3 * shape.ffn_hidden_size) + _width(workload, shape.hidden_size) * (2 if alone else 4)
    )
    if gathers(workload, layout):
        # What others read: this process's tokens, and its experts' rows.
        layer += (tokens / tp + rows) * _width(workload, shape.hidden_size)
    # The activation that is made again.
    layer += rows * _width(workload, shape.ffn_hidden_size)
    if layout.recompute == "selective":
        layer += rows * _width(workload, shape.hidden_size)
    if layout.recompute in RUNS_AGAIN:
        layer += tokens * kept_per_token(workload, dataclasses.replace(layout, recompute="none"))
    elif is_recorded(workload, layout):
        layer += RECORDED
    if workload.expert_bytes < 1:
        # One linear layer's experts in 16 bit, for the product.
        layer += shape.num_experts * 4 * shape.ffn_hidden_size * shape.hidden_size / layout.expert_model_parallel_size
    elif workload.expert_bytes == 1:
        # The larger input in 8 bit.
        layer += rows * 2 * shape.ffn_hidden_size
    return max(loss, layer)


def _beside_recorded(workload: Workload, layout: Layout) -> float:
    """What looking at pairs kept back takes: nothing where what training takes is free meanwhile, else a forward pass
    of its own, rows sent one by one: the loss and a layer's experts, as blocks of one do not fit the other."""
    if not (workload.validates and is_recorded(workload, layout)):
        return 0.0
    shape, tp, ep = workload.architecture, layout.tensor_model_parallel_size, layout.expert_model_parallel_size
    loss = workload.tokens * shape.vocab_size * LOSS_BYTES / tp
    rows = shape.moe_router_topk * workload.tokens * (1.0 if ep == 1 else IMBALANCE) / tp
    layer = rows * (_width(workload, 3 * shape.ffn_hidden_size) + _width(workload, shape.hidden_size) * 4)
    if workload.expert_bytes < 1:
        layer += shape.num_experts * 4 * shape.ffn_hidden_size * shape.hidden_size / ep
    return loss + layer


def _communication(workload: Workload, layout: Layout) -> float:
    if workload.gpus == 1:
        return 0.0
    # Training reads or gathers what is sent one by one then.
    further = workload.validates and layout.expert_model_parallel_size > 1 and gathers(workload, layout)
    return COMMUNICATION + (ANOTHER_GROUP if further else 0)


def layouts(workload: Workload) -> Iterator[Layout]:
    """Every layout that the model and this many GPUs allow."""
    shape, gpus = workload.architecture, workload.gpus
    for tp in _divisors(gpus):
        for ep in _divisors(gpus):
            if shape.layout_problems(tp, ep) or workload.seq_length % tp:
                continue
            for recompute in RECOMPUTE:
                yield Layout(tp, ep, recompute)


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def relative_speed(workload: Workload, layout: Layout) -> float:
    """A GPU's rate against one that holds everything and recomputes nothing, at 2,048 tokens.

    Measured: 97 to 98 % (EP2) and 90 % (EP4, a first form) where rows are read or tokens gathered and the pass is
    recorded, 86 to 91 % and 70 to 78 % where rows are sent one by one; TP2 costs a fifth. Counted: running the forward
    pass again is half as many products on top, a selective recomputation some passes over memory. Assumed, not
    measured: each further doubling of TP costs another fifth; copies to the host and back, which run beside the
    products, 3 %.
    """
    tp = layout.tensor_model_parallel_size
    spread = 1.0
    if layout.expert_model_parallel_size == 2:
        spread = 0.97 if gathers(workload, layout) else 0.88
    elif layout.expert_model_parallel_size > 2:
        spread = 0.92 if gathers(workload, layout) else 0.78
    again = {"none": 1.0, "selective": 0.95, "full": 0.7, "offload": 0.68}[layout.recompute]
    return float(spread * again * 0.8 ** (tp.bit_length() - 1))


def rate_by_tokens(tokens: int) -> float:
    """RATE_BY_TOKENS between and beyond what was measured."""
    for (begin, low), (end, high) in itertools.pairwise(RATE_BY_TOKENS):
        if tokens <= end:
            return low + (high - low) * math.log(max(tokens, begin) / begin) / math.log(end / begin)
    return RATE_BY_TOKENS[-1][1]


def faster_micro_batch(workload: Workload, chosen: Choice, gpu_memory: float) -> tuple[int, Choice, float] | None:
    """A larger micro batch that fits as well: its size, the best choice for it, and its rate over the chosen one's;
    None where none is worth telling."""

    def rate(choice: Choice, tokens: int) -> float:
        return rate_by_tokens(tokens * choice.layout.expert_model_parallel_size) * choice.relative_speed

    found, tokens = [], workload.seq_length * workload.micro_batch_size
    for factor in (2, 4, 8, 16):
        larger = dataclasses.replace(workload, micro_batch_size=workload.micro_batch_size * factor)
        choice = best(larger, gpu_memory) if tokens * factor <= RATE_BY_TOKENS[-1][0] else None
        # What goes through the host's memory and back is for those who have no choice.
        if choice is not None and choice.layout.recompute != "offload":
            found.append((larger.micro_batch_size, choice, rate(choice, tokens * factor) / rate(chosen, tokens)))
    fastest = max(found, key=lambda each: each[2], default=None)
    return fastest if fastest is not None and fastest[2] >= WORTH_TELLING else None


def ranked(workload: Workload, gpu_memory: float, host_memory: float = math.inf) -> list[Choice]:
    """All layouts, the best that fits first: fast before slow, so EP before TP and little recomputation before much;
    among equals the one that leaves more free. Those that take the host's memory come after all others that fit, those
    that do not fit last, the smallest first."""
    choices = []
    for layout in layouts(workload):
        mesh = within(workload, layout, USABLE * gpu_memory)
        needed = memory(mesh, layout)
        pinned = host_bytes(workload, layout)
        fits = needed.total <= USABLE * gpu_memory and pinned <= USABLE_OF_HOST * host_memory
        choices.append(Choice(layout, needed, pinned, fits, relative_speed(mesh, layout)))
    return sorted(
        choices,
        key=lambda each: (
            not each.fits,
            each.fits and each.layout.recompute == "offload",
            -each.relative_speed if each.fits else 0.0,
            each.memory.total,
        ),
    )


def best(workload: Workload, gpu_memory: float) -> Choice | None:
    """The first of `ranked` that fits."""
    first = next(iter(ranked(workload, gpu_memory)), None)
    return first if first is not None and first.fits else None
