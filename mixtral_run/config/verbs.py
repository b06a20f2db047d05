"""What each verb is to do: frozen dataclasses of settings, which go to JSON and back. Standard library only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.fields import Config, flag_of, setting
from mixtral_run.config.gpus import DEFAULT_MEMORY_GIB, GPU_MODELS

LORA_TARGET_MODULES = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
"""The linear layers that can carry an adapter, in Megatron's names."""

BASE_PRECISIONS = ("bf16", "fp8", "nf4")
"""How a frozen base is kept: as the rest of the model, or its experts in 8 or 4 bit."""

KEEP_QUANTISED = ("yes", "use", "no")
"""What is done with a base's experts in 8 or 4 bit that are kept beside it: taken and made, taken, neither."""

RECOMPUTE = ("none", "selective", "full", "offload")
"""How much of a layer is computed again in the backward pass, least first; offload: as full, and what is kept for that
lies in host memory."""

RUNS_AGAIN = ("full", "offload")
"""Where a whole layer is."""

HF_MODEL_SETTINGS = ("load", "against", "hf_model_path")
"""Settings that take an HF model: a directory, or its name on the hub."""


def may_be_hub_name(text: str) -> bool:
    """Whether a text has the form of a model's name on the hub: ORG/NAME, or ORG/NAME@REVISION."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[A-Za-z0-9][\w./-]*)?", text) is not None


def hub_name_and_revision(text: str) -> tuple[str, str | None]:
    """`ORG/NAME@v1` → ("ORG/NAME", "v1"); a path stays whole."""
    name, _, revision = text.partition("@") if may_be_hub_name(text) else (text, "", "")
    return name, revision or None


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Config):
    """How a model is laid out over processes."""

    tensor_model_parallel_size: int = setting(2, help="Processes that share each attention layer (TP).", minimum=1)
    expert_model_parallel_size: int = setting(4, help="Processes that share the experts of a layer (EP).", minimum=1)
    expert_tensor_parallel_size: int = setting(
        1,
        help="Processes that share one expert (ETP). Only 1: one adapter an expert needs the expert whole.",
        minimum=1,
    )

    def problems(self) -> list[str]:
        found = super().problems()
        if self.expert_tensor_parallel_size != 1:
            found.append(
                "--expert-tensor-parallel-size: expected 1 (adapters are kept one an expert, which splitting an "
                f"expert would break); found {self.expert_tensor_parallel_size}"
            )
        return found

    def world_size_problems(self, world_size: int) -> list[str]:
        """What keeps this layout from fitting `world_size` processes."""
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
    """How the processes of a job are started."""

    nproc_per_node: int | None = setting(
        None, help="Processes to start here. Default: the number of GPUs, else 2 on CPU.", minimum=1
    )
    device: str = setting("auto", help="auto takes the GPUs where there are any.", choices=("auto", "cuda", "cpu"))
    dtype: str = setting(
        "auto",
        help="Precision of weights and activations; auto is the checkpoint's own (float16: bf16 on GPUs, fp32 on CPU).",
        choices=("auto", "bf16", "fp32"),
    )
    distributed_timeout_minutes: int = setting(
        10, help="How long a process waits for the others before the job is given up.", minimum=1
    )
    seed: int = setting(1234, help="Seed of weights, data order, dropout and sampling.", minimum=0)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ParallelConfig):
    """HF weights → Megatron torch_dist, or the way back."""

    hf_model_path: str | None = setting(
        None,
        help="The HF model: its directory, or its name on the hub (NAME@REVISION for another than main). With "
        "--from-megatron: what to take config.json and the tokenizer from, which a checkpoint of Megatron-LM lacks.",
    )
    from_megatron: Path | None = setting(
        None,
        help="The way back: a checkpoint of any layout, also one trained on with Megatron-LM or Megatron-Bridge, from "
        "which --output-path becomes an HF model.",
    )
    adapter: Path | None = setting(None, help="With --from-megatron: merge this adapter of that checkpoint in.")
    output_path: Path = setting(help="Folder to write; must be empty or new.")
    workers: int | None = setting(
        None, help="Threads that copy. Default: as many as the first seconds show to be worth it.", minimum=1
    )
    overwrite: bool = setting(False, help="Replace what an earlier conversion left in the output folder.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.hf_model_path is None and self.from_megatron is None:
            found.append("--hf-model-path is required, or --from-megatron in its place; found neither")
        if self.hf_model_path == "":
            found.append("--hf-model-path: expected a directory, or a name on the hub; found ''")
        if self.adapter is not None and self.from_megatron is None:
            found.append("--adapter: expected --from-megatron CHECKPOINT beside it; found none")
        return found


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(LaunchConfig):
    """What a checkpoint is, and whether it holds what it was made from."""

    tensor_model_parallel_size: int = setting(1, help="TP of the logits comparison.", minimum=1)
    expert_model_parallel_size: int = setting(1, help="EP of the logits comparison.", minimum=1)
    nproc_per_node: int | None = setting(1, help="Processes of the logits comparison.", minimum=1)
    dtype: str = setting("fp32", help="Precision of the logits comparison.", choices=("auto", "bf16", "fp32"))
    load: Path = setting(help="The torch_dist checkpoint, or an HF model: its directory, or its name on the hub.")
    against: Path | None = setting(
        None, help="HF model to compare every tensor with, bit by bit: directory or name on the hub."
    )
    logits: bool = setting(True, help="With --against: also compare logits with HF's when the model fits in memory.")
    adapter: Path | None = setting(None, help="Compare logits with this adapter on the checkpoint …")
    peft_path: Path | None = setting(None, help="… and this exported PEFT directory on the HF model.")
    logits_tolerance: float = setting(
        1e-3, help="Largest difference of two logits that still counts as equal.", above=0
    )
    logits_file: Path | None = setting(None, help="Also write the logits comparison there, as JSON.")
    proof: bool = setting(False, help="Read every byte once and check it by the checkpoint's own proof.json.")
    json: bool = setting(False, help="Print the report as JSON.")

    def problems(self) -> list[str]:
        found = super().problems()
        if (self.adapter is None) != (self.peft_path is None):
            found.append("--adapter and --peft-path: expected both or neither; found one")
        if self.adapter is not None and self.against is None:
            found.append("--adapter: expected --against HF_DIR beside it; found none")
        return found


@dataclass(frozen=True, kw_only=True)
class DataConfig(LaunchConfig):
    """What a training run is fed with, and how much of it."""

    load: Path = setting(
        help="The base: a converted checkpoint of any TP/EP layout, or an HF model's directory or name on the hub."
    )
    data_path: Path | None = setting(
        None,
        help='JSONL file of {"instruction": …, "response": …} or {"messages": […]}.',
    )
    mock_data: bool = setting(False, help="Train on random tokens instead of a file.")
    micro_batch_size: int = setting(1, help="Samples a process takes through the model at once.", minimum=1)
    global_batch_size: int = setting(8, help="Samples of one iteration, over all processes.", minimum=1)
    train_iters: int = setting(10, help="Iterations to train.", minimum=1)
    seq_length: int = setting(512, help="Tokens of a sample; shorter ones are padded, longer ones cut.", minimum=2)
    log_interval: int = setting(1, help="Iterations between log lines.", minimum=1)
    lr: float = setting(1e-4, help="Highest learning rate, after the warm-up.", above=0)
    min_lr: float = setting(1e-5, help="Learning rate at the end of the cosine decay.", minimum=0)
    lr_warmup_iters: int = setting(0, help="Iterations over which the learning rate rises linearly.", minimum=0)
    weight_decay: float = setting(0.01, help="AdamW's decoupled weight decay.", minimum=0)
    clip_grad: float = setting(1.0, help="Largest norm of the gradient; 0 switches clipping off.", minimum=0)
    recompute: str | None = setting(
        None,
        help="What to compute again in the backward pass: selective is norms, activations and permutation, full is "
        "the whole layer, offload the same with the layers' inputs in host memory meanwhile. Default: for LoRA on GPUs "
        "the least that fits by the plan, else none.",
        choices=RECOMPUTE,
    )
    recompute_activations: bool = setting(False, help="The same as --recompute full.")
    cuda_graphs: bool = setting(
        True, help="Record the pass over a micro batch once and replay it, where that pays (on GPUs)."
    )

    @property
    def recomputation(self) -> str:
        """One of RECOMPUTE; none where nothing was said."""
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
    """LoRA on a converted checkpoint."""

    valid_data_path: Path | None = setting(None, help="JSONL file of pairs kept back: their loss is told.")
    eval_interval: int = setting(
        100, help="Iterations between looks at --valid-data-path; also before the first, after the last.", minimum=1
    )
    save: Path = setting(help="Folder for the adapter's checkpoints; must be new or empty unless --resume.")
    resume: bool = setting(False, help="Go on from the newest checkpoint in --save.")
    pack: bool = setting(
        False, help="Put several pairs into one row of --seq-length, none seeing another; batch sizes count rows."
    )
    base_precision: str = setting(
        "bf16",
        help="fp8 keeps the experts' frozen weights in 8 bit and multiplies in 8 bit on H100 and H200; nf4 keeps them "
        "in 4 bit, for 40 GB cards; bf16 keeps them as --dtype says.",
        choices=BASE_PRECISIONS,
    )
    keep_quantised: str = setting(
        "yes",
        help="Of experts in fp8 or nf4 beside the base, in LOAD/quantised-fp8 or -nf4: yes takes those that are there, "
        "and else keeps its own for the next start (45 or 24 GB); use takes them and writes none; no does neither.",
        choices=KEEP_QUANTISED,
    )
    layout: str = setting(
        "given",
        help="auto: instead of the TP and EP given, the fastest layout that fits by the plan, EP before TP.",
        choices=("given", "auto"),
    )
    save_interval: int = setting(
        500, help="Iterations between checkpoints; one is always written at the end.", minimum=1
    )
    lora_rank: int = setting(16, help="Rank r of every adapter.", minimum=1)
    lora_alpha: float = setting(32.0, help="Adapters are scaled by alpha / rank.", above=0)
    lora_dropout: float = setting(0.0, help="Dropout on the input of every adapter.", minimum=0, maximum=0.99)
    lora_target_modules: tuple[str, ...] = setting(
        LORA_TARGET_MODULES, help="Layers that get an adapter, with commas between.", choices=LORA_TARGET_MODULES
    )
    tensorboard: bool = setting(True, help="Write loss, learning rate and speed to SAVE/tensorboard.")

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pack and self.mock_data:
            found.append("--pack: expected --data-path beside it; found --mock-data, whose samples fill their rows")
        return found


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Config):
    """Memory of each layout, before anything runs."""

    gpus: int = setting(8, help="GPUs of the job.", minimum=1)
    gpu: str | None = setting(
        None,
        help="GPU model to plan for. Default: the GPU of this machine, else Hopper (H100, H200).",
        choices=tuple(GPU_MODELS),
    )
    gpu_memory: float | None = setting(
        None, help=f"Memory of one GPU in GiB. Default: that of --gpu, else {DEFAULT_MEMORY_GIB:g}.", above=0
    )
    load: Path | None = setting(None, help="A converted checkpoint or an HF model to plan for. Default: Mixtral 8x7B.")
    seq_length: int = setting(512, help="Tokens of a sample.", minimum=2)
    micro_batch_size: int = setting(1, help="Samples a process takes through the model at once.", minimum=1)
    lora_rank: int = setting(16, help="Rank r of every adapter.", minimum=1)
    lora_dropout: float = setting(0.0, help="Dropout on the input of every adapter.", minimum=0, maximum=0.99)
    lora_target_modules: tuple[str, ...] = setting(
        LORA_TARGET_MODULES, help="Layers that get an adapter, with commas between.", choices=LORA_TARGET_MODULES
    )
    base_precision: str = setting("bf16", help="How the frozen experts are kept.", choices=BASE_PRECISIONS)
    host_memory: float | None = setting(
        None, help="RAM of one host in GiB, for --recompute offload. Default: not looked at.", above=0
    )
    all: bool = setting(False, help="Also show the layouts that do not fit.")
    json: bool = setting(False, help="Print the plan as JSON.")


@dataclass(frozen=True, kw_only=True)
class UpConfig(FinetuneConfig):
    """A bare host to an adapter here. Relative paths but those of data and `output_path` are the host's."""

    hf_model_path: str = setting(
        "mistralai/Mixtral-8x7B-v0.1", help="HF model to convert: its name on the hub, or its folder on the host."
    )
    load: Path = setting(Path("mixtral"), help="The converted checkpoint on the host; made when it is not there.")
    save: Path = setting(Path("adapter"), help="Folder on the host for the adapter's checkpoints.")
    output_path: Path = setting(Path("adapter"), help="Folder on this machine for the exported adapter.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    """Training of all weights for a few iterations; nothing is saved."""

    optimizer: str = setting(
        "sgd", help="sgd keeps no state; adamw keeps two numbers a weight.", choices=("sgd", "adamw")
    )
    global_batch_size: int = setting(
        0, help="Samples of one iteration, over all processes; 0: one micro batch a process.", minimum=0
    )
    clip_grad: float = setting(0.0, help="Largest norm of the gradient; 0 switches clipping off.", minimum=0)
    metrics_file: Path | None = setting(None, help="Also write each iteration's figures there, as JSON lines.")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(LaunchConfig):
    """Continue prompts."""

    load: Path = setting(
        help="The base: a converted checkpoint of any TP/EP layout, or an HF model's directory or name on the hub."
    )
    adapter: Path | None = setting(None, help="An adapter checkpoint that finetune saved.")
    prompt: tuple[str, ...] = setting((), help="A prompt, taken as it is; may be given several times.")
    instruction: tuple[str, ...] = setting(
        (), help="An instruction, put into the template that finetune trains with; may be given several times."
    )
    prompts_file: Path | None = setting(None, help="Text file with one instruction a line.")
    max_new_tokens: int = setting(128, help="Most tokens to add to each prompt.", minimum=1)
    temperature: float = setting(0.0, help="0 takes the likeliest token; above, tokens are drawn.", minimum=0)
    top_p: float = setting(
        1.0, help="Draw from the likeliest tokens that together reach this probability.", above=0, maximum=1
    )
    cuda_graphs: bool = setting(
        True, help="Record the pass over one token once and replay it, where that pays (on GPUs)."
    )
    json: bool = setting(False, help="Print the answers as JSON.")
    output_file: Path | None = setting(None, help="Also write the answers there, as JSON.")

    def problems(self) -> list[str]:
        found = super().problems()
        if not (self.prompt or self.instruction or self.prompts_file):
            found.append("--prompt, --instruction or --prompts-file: expected at least one; found none")
        found += ["--prompt: expected text; found an empty one" for each in self.prompt if not each]
        found += ["--instruction: expected text; found an empty one" for each in self.instruction if not each.strip()]
        return found


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Adapter → PEFT directory, or a merged HF model."""

    adapter: Path = setting(help="The adapter checkpoint that finetune saved.")
    hf_model_path: Path | None = setting(
        None, help="HF model of the base, its directory or name on the hub; needed by --merge."
    )
    output_path: Path = setting(help="Folder to write; must be empty or new.")
    format: str = setting(
        "peft",
        help="peft keeps each expert apart (PEFT converts it when it loads); peft-fused is PEFT's own stacked form; "
        "vllm has all three matrices of every expert.",
        choices=("peft", "peft-fused", "vllm"),
    )
    merge: bool = setting(False, help="Write a full HF model with the adapter merged in, by streaming.")
    overwrite: bool = setting(False, help="Replace what an earlier export left in the output folder.")


@dataclass(frozen=True, kw_only=True)
class SmokeConfig(LaunchConfig):
    """Convert, train, fine-tune and generate on this machine."""

    hf_model_path: str | None = setting(None, help="HF model to convert when --load holds no checkpoint yet.")
    random_layers: int | None = setting(
        None,
        help="Make a random Mixtral of full width with this many layers instead: nothing is downloaded.",
        minimum=1,
    )
    load: Path = setting(Path("smoke/checkpoint"), help="The converted checkpoint; made when it is not there.")
    work_path: Path = setting(
        Path("smoke"), help="Folder for the adapter and the report; earlier smoke's are replaced."
    )
    seq_length: int = setting(512, help="Tokens of a sample.", minimum=2)
    micro_batch_size: int = setting(1, help="Samples a process takes at once.", minimum=1)
    global_batch_size: int = setting(8, help="Samples of one iteration.", minimum=1)
    train_iters: int = setting(10, help="Iterations of each training.", minimum=1)
    recompute_activations: bool = setting(True, help="Recompute activations in the backward pass.")
    json: bool = setting(False, help="Print the report as JSON.")


@dataclass(frozen=True, kw_only=True)
class RehearseConfig(Config):
    """The whole job at small size."""

    work_path: Path = setting(
        Path("rehearsal"), help="Folder for everything it makes; an earlier rehearsal's is replaced."
    )
    device: str = setting("auto", help="auto takes the GPUs where there are any.", choices=("auto", "cuda", "cpu"))
    seed: int = setting(1234, help="Seed of the model and of training.", minimum=0)
    host: bool = setting(False, help="Set a throw-away host up over SSH and rehearse in its container instead.")
    json: bool = setting(False, help="Print the report as JSON.")
