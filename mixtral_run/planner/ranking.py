"""Order of the layouts that fit: estimated speed first. Standard library and sizes only."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mixtral_run.config.context import EXPERT_CHUNK_TOKENS, row_multiple
from mixtral_run.config.recompute import RECOMPUTE, RUNS_AGAIN
from mixtral_run.model.kernels.requirements import EIGHT_BIT_ALIGNMENT, attention_problems
from mixtral_run.planner.memory_model import USABLE, USABLE_OF_HOST, execution, fit_dispatch, host_bytes, memory
from mixtral_run.planner.workload import Layout, Memory, Workload

RATE_BY_TOKENS = ((512, 0.70), (2048, 1.0), (8192, 1.14))
"""Tokens that all experts share, and the rate relative to 2,048 tokens: more tokens fill the experts' products better.
Sequences of up to 2,048 tokens, one H200, bf16."""
MIN_REPORTED_GAIN = 1.05
RECOMPUTED = {"none": 1.0, "selective": 0.95, "full": 0.73, "offload": 0.71}
"""Rate with a recomputation, relative to none, at 2,048 tokens."""
AGAIN = 0.36
"""Time of a layer that runs again except attention, over that of its other products, forward and backward."""
ATTENTION_TOKENS = 40_000
"""Length of rows at which attention takes as long as all else, forward and backward. A quarter of that is forward."""
FILLED = 0.94
"""Part of a GPU's memory up to which the planner stores activations of layers instead of running them again. It is less
than USABLE: the plan is up to 3 % off, and layers are added until this is full, while other layouts leave something."""


@dataclass(frozen=True)
class Choice:
    """A layout with its memory and speed.

    Attributes:
        memory: bytes on the fullest GPU.
        host_bytes: bytes of RAM on each host (memory_model.host_bytes).
        fits: True if both fit.
        relative_speed: of a GPU, relative to one GPU that holds everything and recomputes nothing.
    """

    layout: Layout
    memory: Memory
    host_bytes: float
    fits: bool
    relative_speed: float


def layouts(workload: Workload, context: int = 1) -> Iterator[Layout]:
    """Yield every layout with this CP that the model, the length of a row and the number of GPUs allow.

    With attention in 8 bit these are layouts whose parts of its weights can be multiplied in 8 bit.
    """
    shape, gpus = workload.architecture, workload.gpus
    in_8_bit = workload.attention_precision == "fp8"
    able = shape.aligned_tensor_sizes(EIGHT_BIT_ALIGNMENT) if in_8_bit else _divisors(gpus)
    for tp in _divisors(gpus):
        for ep in _divisors(gpus):
            if (
                tp not in able
                or shape.layout_problems(tp, ep)
                or workload.seq_length % row_multiple(tp, context)
                or gpus % (tp * context)
            ):
                continue
            for recompute in RECOMPUTE:
                layout = Layout(tp, ep, recompute, context)
                for chunks in _chunks(workload, layout):
                    layers = workload.recompute_layers if recompute in RUNS_AGAIN and chunks == 1 else None
                    yield dataclasses.replace(layout, expert_chunks=chunks, recompute_layers=layers)


def eight_bit_problems(workload: Workload, otherwise: Collection[int]) -> list[str]:
    """Return why attention in 8 bit cannot be used on these GPUs, or with any layout.

    otherwise: the sizes of TP that would be possible without it.
    """
    able = workload.architecture.aligned_tensor_sizes(EIGHT_BIT_ALIGNMENT)
    none = otherwise and not {*able}.intersection(otherwise)
    widths = workload.architecture.attention_widths(min(otherwise)) if none else ()
    return attention_problems(workload.compute_capability, workload.kernels, workload.weight_bytes, widths, able)


def _chunks(workload: Workload, layout: Layout) -> list[int]:
    """Return the numbers of chunks for the experts of a layout; none if it cannot have as many as were asked for."""
    runs_again, given = layout.recompute in RUNS_AGAIN, workload.expert_chunks
    if given is not None:
        return [given] if given == 1 or runs_again else []
    tokens = workload.tokens(layout) / layout.tensor_model_parallel_size
    return sorted({1, math.ceil(tokens / EXPERT_CHUNK_TOKENS)}) if runs_again else [1]


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def contexts(workload: Workload) -> list[int]:
    """Return the numbers of ranks (CP) that may share a row, the one that is tried first at the beginning."""
    given = workload.context_parallel_size
    return _divisors(workload.gpus) if given is None else [given]


def tensor_sizes(workload: Workload) -> set[int]:
    """Return the sizes of TP of all layouts."""
    return {each.tensor_model_parallel_size for context in contexts(workload) for each in layouts(workload, context)}


def relative_speed(workload: Workload, layout: Layout) -> float:
    """Return a GPU's rate relative to one that holds everything and recomputes nothing, at 2,048 tokens.

    Measured: 97 to 98 % (EP2) and 90 % (EP4, an earlier version) with a dispatch of fixed shapes and a captured pass,
    86 to 91 % and 70 to 78 % with all-to-all; TP2 costs a fifth. Counted: recomputing the forward pass, of which
    linear_fc2 and SwiGLU are left out, adds 36 % of the products, and selective recomputation some passes over memory;
    except-attention saves a forward pass of attention, a quarter of its time. Assumed, not measured: each further
    doubling of TP costs another fifth; copies to the host and back, which overlap with the products, cost 3 %; each
    doubling of CP costs 3 %; experts in chunks cost 2 %.
    """
    tp = layout.tensor_model_parallel_size
    spread = 1.0
    fixed = execution(workload, layout).dispatch.has_fixed_shapes
    if layout.expert_model_parallel_size == 2:
        spread = 0.97 if fixed else 0.88
    elif layout.expert_model_parallel_size > 2:
        spread = 0.92 if fixed else 0.78
    recomputed = recomputed_rate(workload, layout)
    shared = 0.97 ** (layout.context_parallel_size.bit_length() - 1)
    cut = 0.98 if layout.expert_chunks > 1 else 1.0
    return float(spread * recomputed * shared * cut * 0.8 ** (tp.bit_length() - 1))


def recomputed_rate(workload: Workload, layout: Layout) -> float:
    """Return the rate with the recomputation of a layout, relative to none. Times of layers add up."""
    count = workload.architecture.num_layers
    part = layout.layers_again(count) / count
    if layout.recompute == "except-attention":
        attention = workload.seq_length / ATTENTION_TOKENS
        others = 1 + AGAIN + attention
        rate = RECOMPUTED["full"] * (others + attention / 4) / others
    else:
        rate = RECOMPUTED[layout.recompute]
    return 1 / (part / rate + (1 - part) / RECOMPUTED["selective"])


def rate_by_tokens(tokens: int) -> float:
    """Interpolate RATE_BY_TOKENS between its measured points, and hold it constant beyond them."""
    for (begin, low), (end, high) in itertools.pairwise(RATE_BY_TOKENS):
        if tokens <= end:
            return low + (high - low) * math.log(max(tokens, begin) / begin) / math.log(end / begin)
    return RATE_BY_TOKENS[-1][1]


def faster_micro_batch(workload: Workload, chosen: Choice, gpu_memory: float) -> tuple[int, Choice, float] | None:
    """Return the fastest larger micro batch that fits: its size, its best choice, and its rate over the chosen one's.

    Return None if none gains at least MIN_REPORTED_GAIN. gpu_memory: bytes of one GPU.
    """

    def rate(choice: Choice, tokens: int) -> float:
        layout = choice.layout
        of_experts = tokens * layout.expert_model_parallel_size // layout.context_parallel_size
        return rate_by_tokens(of_experts) * choice.relative_speed

    found, tokens = [], workload.seq_length * workload.rows
    for factor in (2, 4, 8, 16):
        larger = dataclasses.replace(
            workload,
            micro_batch_size=workload.micro_batch_size * factor,
            context_parallel_size=chosen.layout.context_parallel_size,
        )
        choice = best(larger, gpu_memory) if tokens * factor <= RATE_BY_TOKENS[-1][0] else None
        # Offload is a last resort and is never suggested.
        if choice is not None and choice.layout.recompute != "offload":
            found.append((larger.micro_batch_size, choice, rate(choice, tokens * factor) / rate(chosen, tokens)))
    fastest = max(found, key=lambda each: each[2], default=None)
    return fastest if fastest is not None and fastest[2] >= MIN_REPORTED_GAIN else None


def ranked(workload: Workload, gpu_memory: float, host_memory: float = math.inf) -> list[Choice]:
    """Return all layouts, the best one that fits first.

    Fast layouts come before slow ones, so EP before TP and little recomputation before much; among equals, the one with
    less memory. Layouts that offload to the host come after all others that fit, those that do not fit last, smallest
    first. Rows are split over ranks (CP) as the workload says, or, if it does not, where nothing fits otherwise.
    gpu_memory, host_memory: bytes of one GPU and of one host's RAM.
    """
    choices = _choices(workload, workload.context_parallel_size or 1, gpu_memory, host_memory)
    if workload.context_parallel_size is None and not any(each.fits for each in choices):
        for context in contexts(workload)[1:]:
            choices += _choices(workload, context, gpu_memory, host_memory)
    return sorted(
        choices,
        key=lambda each: (
            not each.fits,
            each.fits and each.layout.recompute == "offload",
            -each.relative_speed if each.fits else 0.0,
            each.memory.total,
        ),
    )


def _choices(workload: Workload, context: int, gpu_memory: float, host_memory: float) -> list[Choice]:
    choices = []
    for whole in layouts(workload, context):
        for layout in (whole, *_with_stored_layers(workload, whole, gpu_memory)):
            fitted = fit_dispatch(workload, layout, USABLE * gpu_memory)
            needed = memory(fitted, layout)
            pinned = host_bytes(workload, layout)
            fits = needed.total <= USABLE * gpu_memory and pinned <= USABLE_OF_HOST * host_memory
            choices.append(Choice(layout, needed, pinned, fits, relative_speed(fitted, layout)))
    return choices


def _with_stored_layers(workload: Workload, layout: Layout, gpu_memory: float) -> list[Layout]:
    """Return the layout with as few layers that run again as fit, if some of them must and not all.

    There is none where layers offload their inputs, the last resort, or where experts compute in chunks.
    """
    able = layout.recompute in ("except-attention", "full") and layout.expert_chunks == 1
    if not able or layout.recompute_layers is not None:
        return []

    def fits(layout: Layout, part: float) -> bool:
        return memory(fit_dispatch(workload, layout, part * gpu_memory), layout).total <= part * gpu_memory

    if fits(dataclasses.replace(layout, recompute="selective"), USABLE):
        return []
    counts = range(1, workload.architecture.num_layers)
    fewest = bisect.bisect_left(
        counts, True, key=lambda count: fits(dataclasses.replace(layout, recompute_layers=count), FILLED)
    )
    return [dataclasses.replace(layout, recompute_layers=counts[fewest])] if fewest < len(counts) else []


def best(workload: Workload, gpu_memory: float) -> Choice | None:
    """Return the first of `ranked` if it fits. gpu_memory: bytes of one GPU."""
    first = next(iter(ranked(workload, gpu_memory)), None)
    return first if first is not None and first.fits else None
