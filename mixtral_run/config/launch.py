"""Settings that every job has: the layout of the model and the start of the processes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from mixtral_run.config.fields import LAYOUT, MEMORY, PROCESSES, Config, flag_of, setting

CONVERTED_LAYOUT = (2, 4)
"""TP and EP that `convert` writes by default. A checkpoint loads in every other layout."""


def layout_name(tensor_size: int, expert_size: int, context_size: int = 1) -> str:
    """Return a layout for people, such as TP2/EP4 or TP1/CP2/EP4."""
    context = f"CP{context_size}/" if context_size > 1 else ""
    return f"TP{tensor_size}/{context}EP{expert_size}"


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Layout of a model over processes."""

    tensor_model_parallel_size: int | None = setting(
        None,
        help="Processes that share each attention layer (TP). Default: the planner chooses.",
        minimum=1,
        section=LAYOUT,
    )
    expert_model_parallel_size: int | None = setting(
        None,
        help="Processes that share the experts of a layer (EP). Default: the planner chooses.",
        minimum=1,
        section=LAYOUT,
    )
    expert_tensor_parallel_size: int = setting(
        1,
        help="Processes that share one expert (ETP). Only 1 is possible: each adapter needs its whole expert.",
        minimum=1,
        section=LAYOUT,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.expert_tensor_parallel_size != 1:
            found.append(
                "--expert-tensor-parallel-size: expected 1 (each expert has one adapter, which needs the whole "
                f"expert); found {self.expert_tensor_parallel_size}"
            )
        return found

    @property
    def layout_sizes(self) -> tuple[int, int]:
        """TP and EP of a settled config, which has both. Raises ValueError if one is still left to the planner."""
        tp, ep = self.tensor_model_parallel_size, self.expert_model_parallel_size
        if tp is None or ep is None:
            raise ValueError("the layout is still left to the planner")
        return tp, ep

    @property
    def has_layout(self) -> bool:
        """True if both TP and EP are known."""
        return None not in (self.tensor_model_parallel_size, self.expert_model_parallel_size)

    @property
    def context_size(self) -> int:
        """CP: the processes that share each row of tokens. Training may have more than one (SplitRowsConfig)."""
        return 1

    def world_size_problems(self, world_size: int) -> list[str]:
        """Return a line for each known size of the layout that does not divide `world_size`."""
        return [
            f"{flag_of(name)}: expected a divisor of the {world_size} processes started; found {size}"
            for name, size in (
                ("tensor_model_parallel_size", self.tensor_model_parallel_size),
                ("expert_model_parallel_size", self.expert_model_parallel_size),
            )
            if size is not None and size >= 1 and world_size % size
        ]


KERNELS = ("auto", "portable", "hopper")
"""Sets of kernels for the experts' products (mixtral_run/model/kernels/requirements.py)."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig(Config):
    """Kernels of the experts' products."""

    kernels: str = setting(
        "auto",
        help="On GPUs: kernels of the experts' products. portable: those for every GPU from A100 and A40 on. hopper: "
        "those for H100, H200 and newer. auto: what the GPU has.",
        choices=KERNELS,
        section=MEMORY,
    )


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(KernelsConfig, ParallelConfig):
    """Start of the processes of a job."""

    nproc_per_node: int | None = setting(
        None,
        help="Processes to start on this machine. Default: one per GPU, or 2 on CPU.",
        minimum=1,
        section=PROCESSES,
    )
    device: str = setting(
        "auto",
        help="Device to run on. auto takes the GPUs if there are any.",
        choices=("auto", "cuda", "cpu"),
        section=PROCESSES,
    )
    dtype: str = setting(
        "auto",
        help="Precision of weights and activations. auto keeps the checkpoint's own; float16 becomes bf16 on GPUs and "
        "fp32 on CPU.",
        choices=("auto", "bf16", "fp32"),
        section=MEMORY,
    )
    distributed_timeout_minutes: int = setting(
        10, help="Minutes that a process waits for the others before the job fails.", minimum=1, section=PROCESSES
    )
    seed: int = setting(
        1234, help="Random seed of weights, data order, dropout and sampling.", minimum=0, section=PROCESSES
    )
