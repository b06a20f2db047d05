"""What the planner counts for: a training job, one layout of it, and the memory of its fullest GPU."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from mixtral_run.config.gpus import GPUS_PER_HOST, HOPPER
from mixtral_run.config.launch import layout_name
from mixtral_run.config.lora import LORA_TARGET_MODULES, module_rank, shares_expert_adapters
from mixtral_run.model.architecture import MIXTRAL_8X7B, MixtralArchitecture

GIB = 1024**3


@dataclass(frozen=True)
class Layout:
    """A split of the model and of rows over ranks, with its recomputation.

    expert_chunks: chunks of a rank's tokens that the experts compute one after the other
    (model/routing/expert_chunks.py). recompute_layers: the first layers, which `recompute` runs again, with selective
    ones behind them; None: all.
    """

    tensor_model_parallel_size: int
    expert_model_parallel_size: int
    recompute: str
    context_parallel_size: int = 1
    expert_chunks: int = 1
    recompute_layers: int | None = None

    def __str__(self) -> str:
        return layout_name(self.tensor_model_parallel_size, self.expert_model_parallel_size, self.context_parallel_size)

    @property
    def ranks_of_a_row(self) -> int:
        """Ranks that split the tokens of a row."""
        return self.tensor_model_parallel_size * self.context_parallel_size

    @property
    def recompute_cell(self) -> str:
        """The recomputation in a table: full, full/4 with experts in chunks, full×9 with 9 layers that run again."""
        name = "except" if self.recompute == "except-attention" else self.recompute
        chunks = f"/{self.expert_chunks}" if self.expert_chunks > 1 else ""
        return name + chunks + (f"×{self.recompute_layers}" if self.recompute_layers is not None else "")

    def layers_again(self, num_layers: int) -> int:
        """Return the number of layers that follow `recompute`; those behind them are selective."""
        return num_layers if self.recompute_layers is None else min(self.recompute_layers, num_layers)

    def flags(self) -> str:
        context = f"--context-parallel-size {self.context_parallel_size} " if self.context_parallel_size > 1 else ""
        return (
            f"--tensor-model-parallel-size {self.tensor_model_parallel_size} {context}"
            f"--expert-model-parallel-size {self.expert_model_parallel_size} --recompute {self.recompute}"
            + (f" --expert-chunks {self.expert_chunks}" if self.expert_chunks > 1 else "")
            + (f" --recompute-layers {self.recompute_layers}" if self.recompute_layers is not None else "")
        )


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The model that is trained, the batch, and the GPUs.

    Attributes:
        rows_per_sample: rows of a sample of the micro batch: two for a pair of answers.
        weight_bytes: bytes per weight of the base without its experts.
        expert_bytes: bytes per expert weight.
        attention_precision: the value of --attention-precision.
        compute_capability: of the GPUs.
        kernels: the value of --kernels.
        cuda_graphs: True if the pass is captured wherever the layout allows it (planner/policy.py).
        peer_access: True if GPUs of one host may read rows from each other (model/dispatch/symmetric_memory.py), for
            which buffers have a capacity of twice the mean number of rows.
        context_parallel_size: ranks that share each row; None if the planner may choose more than one where nothing
            fits otherwise.
        expert_chunks: chunks of a micro batch for the experts; None if the planner may choose more than one.
        recompute_layers: the first layers, which run again if layers do; None for all, or if the planner may choose
            fewer.
        has_validation: True if a validation set is evaluated between iterations (train/validation.py).
    """

    architecture: MixtralArchitecture = MIXTRAL_8X7B
    gpus: int = 8
    seq_length: int = 512
    micro_batch_size: int = 1
    rows_per_sample: int = 1
    lora_rank: int = 16
    lora_rank_experts: int | None = None
    init_lora: str = "default"
    train_also: tuple[str, ...] = ()
    expert_adapters: str = "each"
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = LORA_TARGET_MODULES
    weight_bytes: int = 2
    expert_bytes: float = 2
    attention_precision: str = "bf16"
    gpus_per_host: int = GPUS_PER_HOST
    compute_capability: tuple[int, int] = HOPPER
    kernels: str = "auto"
    cuda_graphs: bool = True
    peer_access: bool = True
    has_validation: bool = False
    context_parallel_size: int | None = None
    expert_chunks: int | None = None
    recompute_layers: int | None = None

    @property
    def fused_experts(self) -> bool:
        """True if both layers of the experts are one step of the backward pass (model/adapters/lora_experts.py)."""
        return {"linear_fc1", "linear_fc2"} <= set(self.lora_target_modules) and self.lora_dropout == 0

    @property
    def rows(self) -> int:
        """Rows of one micro batch."""
        return self.micro_batch_size * self.rows_per_sample

    def tokens(self, layout: Layout) -> int:
        """Return the tokens of one micro batch that a rank has between the layers without TP: its part of the rows."""
        return self.seq_length * self.rows // layout.context_parallel_size

    def expert_tokens(self, layout: Layout) -> int:
        """Return the most tokens of a rank, without TP, that the experts compute at a time."""
        return math.ceil(self.tokens(layout) / layout.expert_chunks)


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
        """The bytes that torch counts: all but the context, which the driver and NCCL hold."""
        return self.total - self.context


def adapter_parameters(workload: Workload, layout: Layout) -> float:
    """Return the number of adapter parameters on one GPU (split: model/adapters/lora.py, model/experts.py)."""
    shape, tp = workload.architecture, layout.tensor_model_parallel_size
    hidden, ffn, ep = shape.hidden_size, shape.ffn_hidden_size, layout.expert_model_parallel_size
    experts = 1 if shares_expert_adapters(workload) else shape.num_experts / ep
    sizes = {
        "linear_qkv": hidden + shape.qkv_size / tp,
        "linear_proj": shape.projection_size / tp + hidden,
        "linear_fc1": experts * (hidden + 2 * ffn),
        "linear_fc2": experts * (ffn + hidden),
    }
    return shape.num_layers * sum(module_rank(workload, name) * sizes[name] for name in workload.lora_target_modules)


def trained_also_parameters(workload: Workload, layout: Layout) -> float:
    """Return the number of the base's weights on one GPU that are trained with the adapters.

    TP splits those that have a row for each token of the vocabulary.
    """
    shape, also = workload.architecture, workload.train_also
    split = [each for each in also if each in ("embeddings", "lm_head")]
    whole = [each for each in also if each not in split]
    padded = shape.padded_vocab_size(layout.tensor_model_parallel_size) / shape.vocab_size
    return shape.num_trained_also(split) * padded / layout.tensor_model_parallel_size + shape.num_trained_also(whole)


def weight_bytes(workload: Workload, layout: Layout) -> float:
    """Return the bytes of the frozen weights on one GPU.

    Attention, embeddings and output layer are split over TP, experts over EP; everything else is on every rank.
    """
    shape = workload.architecture
    hidden = shape.hidden_size
    experts = shape.num_layers * shape.num_experts * 3 * hidden * shape.ffn_hidden_size
    split = shape.num_layers * hidden * (shape.qkv_size + shape.projection_size) + 2 * shape.vocab_size * hidden
    padding = 2 * hidden * (shape.padded_vocab_size(layout.tensor_model_parallel_size) - shape.vocab_size)
    whole = shape.num_parameters - experts - split
    dense = ((split + padding) / layout.tensor_model_parallel_size + whole) * workload.weight_bytes
    if workload.attention_precision == "fp8":
        dense += _attention_in_8_bit(workload, layout)
    expert_bytes: float = workload.expert_bytes
    if workload.expert_bytes == 1:
        # An fp32 scale for each output channel.
        expert_bytes += 4 * (2 * shape.ffn_hidden_size + hidden) / (3 * hidden * shape.ffn_hidden_size)
    return dense + experts * expert_bytes / layout.expert_model_parallel_size


def _attention_in_8_bit(workload: Workload, layout: Layout) -> float:
    """Return how many bytes more attention and the output layer take in 8 bit than in the dtype of the base.

    Each weight has a transposed copy, and an fp32 number for each row and column (kernels/quantized/dense_mm.py).
    """
    shape, tp = workload.architecture, layout.tensor_model_parallel_size
    rows, columns, vocabulary = shape.qkv_size / tp, shape.projection_size / tp, shape.padded_vocab_size(tp) / tp
    weights = shape.hidden_size * (shape.num_layers * (rows + columns) + vocabulary)
    sides = shape.num_layers * (rows + columns + 2 * shape.hidden_size) + vocabulary + shape.hidden_size
    return weights * (2 - workload.weight_bytes) + 4 * sides
