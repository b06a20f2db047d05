"""Settings of the verbs: frozen dataclasses, which travel as JSON. Standard library only.

Those of `plan` are in plan.py, those of `smoke` and `rehearse` in trial.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import Config, flag_of, setting

LORA_TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers that can have an adapter, by Megatron's names."""

BASE_PRECISIONS = ("bf16", "fp8", "nf4")
"""Storage of the frozen experts: in the model's dtype (bf16), in 8 bit (fp8) or in 4 bit (nf4)."""

QUANTIZED_CACHE_MODES = ("yes", "use", "no")
"""Use of the cache of quantized experts: read it or create it, only read it, ignore it."""

RECOMPUTE = ("none", "selective", "full", "offload")
"""How much of a layer the backward pass recomputes, from least to most. offload recomputes as much as full, and keeps
the inputs of the layers in host memory."""

RUNS_AGAIN = ("full", "offload")
"""The values of RECOMPUTE that recompute a whole layer."""

HF_MODEL_SETTINGS = ("load", "against", "hf_model_path")
"""Settings that take an HF model: its directory, or its name on the hub."""

LAYOUT, DATA, PROMPTS, OPTIMIZER = "Model and layout", "Data", "Prompts and sampling", "Optimizer"
LORA, MEMORY, PROCESSES, COMPARISON, OUTPUT = "LoRA", "Memory and precision", "Processes", "Comparison", "Output"
"""Sections of --help."""


def may_be_hub_name(text: str) -> bool:
    """Return True if a text has the form of a model's name on the hub: ORG/NAME, or ORG/NAME@REVISION."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?", text) is not None


def hub_name_and_revision(text: str) -> tuple[str, str | None]:
    """Split `ORG/NAME@v1` into ("ORG/NAME", "v1"). Return a path unchanged, with None."""
    name, _, revision = text.partition("@") if may_be_hub_name(text) else (text, "", "")
    return name, revision or None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """Layout of a model over processes."""

    tensor_model_parallel_size: int = setting(
        2, help="Processes that share each attention layer (TP).", minimum=1, section=LAYOUT
    )
    expert_model_parallel_size: int = setting(
        4, help="Processes that share the experts of a layer (EP).", minimum=1, section=LAYOUT
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

    def world_size_problems(self, world_size: int) -> list[str]:
        """Return a line for each size of the layout that does not divide `world_size`."""
        return [
            f"{flag_of(name)}: expected a divisor of the {world_size} processes started; found {size}"
            for name, size in (
                ("tensor_model_parallel_size", self.tensor_model_parallel_size),
                ("expert_model_parallel_size", self.expert_model_parallel_size),
            )
            if size >= 1 and world_size % size
        ]


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(ParallelConfig):
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


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ParallelConfig):
    """Conversion of HF weights to Megatron torch_dist, and back."""

    hf_model_path: str | None = setting(
        None,
        help="HF model to convert: its directory, or its name on the hub (NAME@REVISION for a revision other than "
        "main). With --from-megatron: the source of config.json and the tokenizer, which a checkpoint that "
        "Megatron-LM saved lacks.",
        section=LAYOUT,
    )
    from_megatron: Path | None = setting(
        None,
        help="Checkpoint to convert back to an HF model, in any layout. Checkpoints that Megatron-LM or "
        "Megatron-Bridge trained and saved work as well.",
        section=LAYOUT,
    )
    adapter: Path | None = setting(
        None, help="With --from-megatron: adapter of that checkpoint to merge into the HF model.", section=LAYOUT
    )
    output_path: Path = setting(help="Folder to write; must be empty or new.", section=OUTPUT)
    workers: int | None = setting(
        None,
        help="Threads that copy. Default: the number that the first seconds show to be fastest.",
        minimum=1,
        section=PROCESSES,
    )
    overwrite: bool = setting(False, help="Replace an earlier conversion in the output folder.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.hf_model_path is None and self.from_megatron is None:
            found.append("--hf-model-path is required, or --from-megatron in its place; found neither")
        if self.hf_model_path == "":
            found.append("--hf-model-path: expected a directory, or a name on the hub; found ''")
        if self.adapter is not None and self.from_megatron is None:
            found.append("--adapter: expected --from-megatron CHECKPOINT with it; found none")
        return found


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(LaunchConfig):
    """Description of a checkpoint, and its comparison with the HF model that it was made from."""

    tensor_model_parallel_size: int = setting(1, help="TP of the logits comparison.", minimum=1, section=COMPARISON)
    expert_model_parallel_size: int = setting(1, help="EP of the logits comparison.", minimum=1, section=COMPARISON)
    nproc_per_node: int | None = setting(
        1, help="Processes of the logits comparison on this machine.", minimum=1, section=PROCESSES
    )
    dtype: str = setting(
        "fp32", help="Precision of the logits comparison.", choices=("auto", "bf16", "fp32"), section=COMPARISON
    )
    load: Path = setting(
        help="torch_dist checkpoint, adapter, or HF model (its directory, or its name on the hub).", section=LAYOUT
    )
    against: Path | None = setting(
        None,
        help="HF model to compare every tensor with, bit by bit: its directory, or its name on the hub.",
        section=COMPARISON,
    )
    logits: bool = setting(
        True,
        help="With --against: also compare the logits with those of the HF model, if both models fit into memory.",
        section=COMPARISON,
    )
    adapter: Path | None = setting(
        None, help="Adapter on the checkpoint for the logits comparison. Needs --peft-path.", section=COMPARISON
    )
    peft_path: Path | None = setting(
        None,
        help="PEFT directory of the same adapter on the HF model for the logits comparison. Needs --adapter.",
        section=COMPARISON,
    )
    logits_tolerance: float = setting(
        1e-3, help="Largest difference of two logits that counts as equal.", above=0, section=COMPARISON
    )
    logits_file: Path | None = setting(
        None, help="JSON file to write the logits comparison to as well.", section=OUTPUT
    )
    proof: bool = setting(
        False, help="Read every byte and check it against the checkpoint's own proof.json.", section=COMPARISON
    )
    json: bool = setting(False, help="Print the report as JSON.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.adapter is None) != (self.peft_path is None):
            found.append("--adapter and --peft-path: expected both or neither; found one")
        if self.adapter is not None and self.against is None:
            found.append("--adapter: expected --against HF_DIR with it; found none")
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig(LaunchConfig):
    """Data and optimizer of a training run."""

    load: Path = setting(
        help="Base model: a converted checkpoint of any TP/EP layout, or an HF model (its directory, or its name on "
        "the hub).",
        section=LAYOUT,
    )
    data_path: Path | None = setting(
        None, help='JSONL file of {"instruction": …, "response": …} or {"messages": […]}.', section=DATA
    )
    mock_data: bool = setting(False, help="Train on random tokens instead of a file.", section=DATA)
    micro_batch_size: int = setting(1, help="Samples per process and forward pass.", minimum=1, section=DATA)
    global_batch_size: int = setting(8, help="Samples per iteration over all processes.", minimum=1, section=DATA)
    train_iters: int = setting(10, help="Iterations to train.", minimum=1, section=OPTIMIZER)
    seq_length: int = setting(
        512, help="Tokens per sample. Shorter samples are padded, longer ones are cut.", minimum=2, section=DATA
    )
    log_interval: int = setting(1, help="Iterations between log lines.", minimum=1, section=OUTPUT)
    lr: float = setting(1e-4, help="Peak learning rate, reached after the warmup.", above=0, section=OPTIMIZER)
    min_lr: float = setting(1e-5, help="Learning rate at the end of the cosine decay.", minimum=0, section=OPTIMIZER)
    lr_warmup_iters: int = setting(0, help="Iterations of linear warmup.", minimum=0, section=OPTIMIZER)
    weight_decay: float = setting(0.01, help="Decoupled weight decay.", minimum=0, section=OPTIMIZER)
    clip_grad: float = setting(
        1.0, help="Largest norm of the gradient. 0 turns clipping off.", minimum=0, section=OPTIMIZER
    )
    recompute: str | None = setting(
        None,
        help="Activations that the backward pass recomputes. selective: those of norms, SwiGLU and permutation. full: "
        "all of a layer. offload: as full, with the inputs of the layers in host memory. Default: for LoRA on GPUs the "
        "least that fits by the plan, else none.",
        choices=RECOMPUTE,
        section=MEMORY,
    )
    recompute_activations: bool = setting(False, help="The same as --recompute full.", section=MEMORY)
    cuda_graphs: bool = setting(
        True,
        help="On GPUs: capture the forward and backward pass of a micro batch as a CUDA graph if that is faster.",
        section=MEMORY,
    )

    @property
    def recomputation(self) -> str:
        """One of RECOMPUTE; none if neither setting was given."""
        return "full" if self.recompute_activations else self.recompute or "none"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.recompute_activations and self.recompute not in (None, "full"):
            found.append(f"--recompute-activations: the same as --recompute full; found --recompute {self.recompute}")
        if self.mock_data and self.data_path is not None:
            found.append("--mock-data and --data-path: expected one of them; found both")
        if not self.mock_data and self.data_path is None:
            found.append("--data-path FILE or --mock-data: expected one of them; found neither")
        if self.min_lr > self.lr:
            found.append(f"--min-lr: expected at most --lr ({self.lr}); found {self.min_lr}")
        if self.lr_warmup_iters >= self.train_iters:
            found.append(
                f"--lr-warmup-iters: expected fewer than --train-iters ({self.train_iters}); "
                f"found {self.lr_warmup_iters}"
            )
        tp = self.tensor_model_parallel_size
        if tp >= 1 and self.seq_length % tp:
            found.append(
                f"--seq-length: expected a multiple of --tensor-model-parallel-size ({tp}), over which the sequence "
                f"is split; found {self.seq_length}"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(DataConfig):
    """LoRA fine-tuning of a base model."""

    valid_data_path: Path | None = setting(
        None, help="JSONL validation set. Its loss is reported every --eval-interval iterations.", section=DATA
    )
    eval_interval: int = setting(
        100,
        help="Iterations between evaluations of --valid-data-path. One runs before the first iteration and one after "
        "the last.",
        minimum=1,
        section=DATA,
    )
    save: Path = setting(
        help="Folder for the checkpoints of the adapter; must be new or empty unless --resume.", section=OUTPUT
    )
    resume: bool = setting(False, help="Continue from the newest checkpoint in --save.", section=OUTPUT)
    pack: bool = setting(
        False,
        help="Pack several samples into one row of --seq-length tokens, without attention between them. Batch sizes "
        "then count rows.",
        section=DATA,
    )
    base_precision: str = setting(
        "bf16",
        help="Storage of the frozen experts. bf16: as --dtype. fp8: 8 bit, multiplied in 8 bit on H100 and H200. nf4: "
        "4 bit, for GPUs of 40 GB.",
        choices=BASE_PRECISIONS,
        section=MEMORY,
    )
    quantized_cache: str = setting(
        "yes",
        help="Cache of the fp8 or nf4 experts, in LOAD/quantised-fp8 (45 GB) or LOAD/quantised-nf4 (24 GB). yes: read "
        "it, or create it if it is missing. use: only read it. no: ignore it.",
        choices=QUANTIZED_CACHE_MODES,
        aliases=("keep_quantised",),
        section=MEMORY,
    )
    layout: str = setting(
        "given",
        help="auto: replace the given TP and EP by the fastest layout that fits by the plan, with EP before TP.",
        choices=("given", "auto"),
        section=LAYOUT,
    )
    save_interval: int = setting(
        500, help="Iterations between checkpoints. One is always written at the end.", minimum=1, section=OUTPUT
    )
    lora_rank: int = setting(16, help="Rank r of every adapter.", minimum=1, section=LORA)
    lora_alpha: float = setting(32.0, help="Adapters are scaled by alpha / rank.", above=0, section=LORA)
    lora_dropout: float = setting(
        0.0, help="Dropout on the input of every adapter.", minimum=0, maximum=0.99, section=LORA
    )
    lora_target_modules: tuple[str, ...] = setting(
        LORA_TARGET_MODULES,
        help="Layers that get an adapter, separated by commas.",
        choices=LORA_TARGET_MODULES,
        section=LORA,
    )
    tensorboard: bool = setting(True, help="Write loss, learning rate and speed to SAVE/tensorboard.", section=OUTPUT)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pack and self.mock_data:
            found.append("--pack: expected --data-path; found --mock-data, whose samples already fill their rows")
        return found


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    """Training of all weights for a few iterations; nothing is saved."""

    optimizer: str = setting(
        "sgd",
        help="sgd keeps no state. adamw keeps two numbers per weight.",
        choices=("sgd", "adamw"),
        section=OPTIMIZER,
    )
    global_batch_size: int = setting(
        0, help="Samples per iteration over all processes. 0: one micro batch per process.", minimum=0, section=DATA
    )
    clip_grad: float = setting(
        0.0, help="Largest norm of the gradient. 0 turns clipping off.", minimum=0, section=OPTIMIZER
    )
    metrics_file: Path | None = setting(
        None, help="JSONL file to write the metrics of each iteration to as well.", section=OUTPUT
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export of an adapter as a PEFT directory, or merged into an HF model."""

    adapter: Path = setting(help="Adapter checkpoint that finetune saved.", section=LAYOUT)
    hf_model_path: Path | None = setting(
        None, help="HF model of the base: its directory, or its name on the hub. --merge needs it.", section=LAYOUT
    )
    output_path: Path = setting(help="Folder to write; must be empty or new.", section=OUTPUT)
    format: str = setting(
        "peft",
        help="peft: one pair of matrices per expert, which PEFT converts when it loads them. peft-fused: PEFT's own "
        "stacked form. vllm: all three matrices of every expert.",
        choices=("peft", "peft-fused", "vllm"),
        section=OUTPUT,
    )
    merge: bool = setting(False, help="Write a full HF model with the adapter merged in, streamed.", section=OUTPUT)
    overwrite: bool = setting(False, help="Replace an earlier export in the output folder.", section=OUTPUT)
