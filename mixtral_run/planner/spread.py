"""Layout of the jobs that the memory model of LoRA runs does not describe: generation, full training, and all on a CPU.

The smallest TP comes first and the largest EP with it: each process then reads and holds the fewest experts, and full
training sums no gradients of experts. On GPUs a layout must also fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mixtral_run.config.context import row_multiple
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import TrainingConfig
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.planner.full_memory import FULL_ACTIVATIONS
from mixtral_run.planner.memory_model import memory
from mixtral_run.planner.workload import Layout, Workload, weight_bytes

GENERATION_BYTES = 2 * 1024**3
"""Assumed size of the key-value cache, the logits and the activations of `generate`."""


def spread_layout(
    config: LaunchConfig,
    architecture: MixtralArchitecture,
    num_processes: int,
    recompute: str,
    fits: Callable[[Layout], bool] = lambda _: True,
) -> Layout:
    """Return the layout with the smallest TP, and with the largest EP for it, that the run allows.

    The sizes that `config` gives are kept. If no layout is possible, the one returned is for the checks to refuse.
    """
    possible = list(_possible(config, architecture, num_processes, recompute))
    fitting = (layout for layout in possible if fits(layout))
    tp, ep = config.tensor_model_parallel_size or 1, config.expert_model_parallel_size or 1
    fallback = Layout(tp, ep, recompute, config.context_size)
    return next(fitting, possible[-1] if possible else fallback)


def _possible(
    config: LaunchConfig, architecture: MixtralArchitecture, num_processes: int, recompute: str
) -> Iterator[Layout]:
    divisors = [each for each in range(1, num_processes + 1) if num_processes % each == 0]
    given_tp, given_ep = config.tensor_model_parallel_size, config.expert_model_parallel_size
    for tp in divisors if given_tp is None else [given_tp]:
        for ep in reversed(divisors) if given_ep is None else [given_ep]:
            layers = config.recompute_layers if isinstance(config, TrainingConfig) else None
            layout = Layout(tp, ep, recompute, config.context_size, recompute_layers=layers)
            if not architecture.layout_problems(tp, ep) and allows(config, layout, num_processes):
                yield layout


def allows(config: LaunchConfig, layout: Layout, num_processes: int) -> bool:
    """Return True if TP and CP split the sequence, and every data-parallel replica takes as many micro batches."""
    if not isinstance(config, TrainingConfig):
        return True
    samples, shared = config.micro_batch_size * num_processes, layout.ranks_of_a_row
    multiple = row_multiple(layout.tensor_model_parallel_size, layout.context_parallel_size)
    return config.seq_length % multiple == 0 and config.global_batch_size * shared % samples == 0


def needed_bytes(config: LaunchConfig, workload: Workload, layout: Layout) -> float:
    """Return the estimated bytes of one GPU for `generate`, or for full training with SGD."""
    if not isinstance(config, PretrainConfig):
        return held_bytes(workload, layout) + GENERATION_BYTES
    lora = memory(workload, layout)
    held = lora.weights if config.max_norm > 0 or config.global_batch_size else 0.0
    return lora.weights + held + FULL_ACTIVATIONS * lora.activations + lora.buffers + lora.context


def held_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of one GPU for the weights and the libraries, without which nothing can be computed."""
    return weight_bytes(workload, layout) + memory(workload, layout).context
