"""Names that other programs have for settings and verbs of the kit, with the kit's own. Standard library only.

The names come from HF's Trainer, PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth, torchtune, Megatron-LM and vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignName:
    """The kit's answer to a name of another program.

    meant: the kit's settings, each with what to write where units or values differ; the first one that the verb has is
    named. note: the answer if the kit has no such setting.
    """

    meant: tuple[tuple[str, str], ...] = ()
    note: str = ""


def _same(*names: str, note: str = "") -> ForeignName:
    return ForeignName(tuple((name, note) for name in names))


def _either(**notes: str) -> ForeignName:
    return ForeignName(tuple((name.replace("_", "-"), note) for name, note in notes.items()))


def _none(note: str) -> ForeignName:
    return ForeignName((), note)


_SAVE = _same("save", "output-path")
_LOAD = _either(
    load="a converted checkpoint, an HF model's directory or its name on the hub",
    hf_model_path="an HF model's directory or its name on the hub",
)
_DATA = _same("data-path")
_VALID = _same("valid-data-path")
_MICRO = _same("micro-batch-size", note="samples per process and forward pass")
_GLOBAL = _same(
    "global-batch-size",
    note="samples per iteration: micro batch size × accumulation steps × data-parallel processes",
)
_EPOCHS = _either(epochs="", train_iters="iterations are examples × epochs / --global-batch-size")
_LENGTH = _either(seq_length="in tokens", max_new_tokens="tokens to add to each prompt")
_LORA_RANK = _same("lora-rank")
_TARGETS = _same(
    "lora-target-modules",
    note="by Megatron's names: linear_qkv (q_proj, k_proj, v_proj), linear_proj (o_proj), linear_fc1 (w1, w3), "
    "linear_fc2 (w2)",
)
_NF4 = _same("base-precision", note="with the value nf4")
_FP8 = _same("base-precision", note="with the value fp8")
_DTYPE = _same("dtype", note="with the value bf16 or fp32; by default the checkpoint's own")
_WARMUP = _same("lr-warmup-iters", note="in iterations")
_WARMUP_RATIO = _either(warmup_ratio="", lr_warmup_iters="iterations are the ratio × --train-iters")
_SCHEDULE = _either(
    lr_scheduler="cosine, linear or constant",
    min_lr="the learning rate decays as a cosine from --lr to --min-lr; equal values keep it constant",
)
_RECOMPUTE = _same("recompute", note="with the value full")
_ADAPTER = _same("init-adapter", "adapter")
_TEMPLATE = _same("chat-template", note="auto, mixtral or a file")
_FORMAT = _same("data-format")
_TP = _same("tensor-model-parallel-size")
_EP = _same("expert-model-parallel-size")
_PROCESSES = _same("nproc-per-node", note="processes on this machine; the default is one per GPU")
_HOSTS = _same("on", note="with the value HOST,HOST; or start the verb under torchrun")
_VALID_FRACTION = _either(valid_fraction="a number between 0 and 1", valid_data_path="a file of its own")
_SHARDING = _none("leave it out: the kit splits the model over the processes by itself, by TP and EP")
_LORA_ALWAYS = _none("leave it out: finetune always trains LoRA adapters, pretrain always all weights")
_LEFT_OUT = _none("leave it out: the kit decides it by itself")
_FROM_LOAD = _none("leave it out: the sizes and the tokenizer are read from --load")
_ADAM = _none("leave it out: AdamW runs with its usual values")
_TOKEN = _none("a token is never given as a flag: log in with `hf auth login`, or bootstrap --hf-token-file FILE")

FOREIGN_FLAGS: dict[str, ForeignName] = {
    **dict.fromkeys(("learning-rate", "peak-lr", "max-lr"), _same("lr")),
    **dict.fromkeys(("min-learning-rate", "lr-min"), _same("min-lr")),
    **dict.fromkeys(("output-dir", "output", "out-dir", "save-dir", "output-folder", "checkpoint-dir"), _SAVE),
    **dict.fromkeys(
        (
            "model",
            "model-name",
            "model-name-or-path",
            "model-path",
            "model-id",
            "base-model",
            "base-model-name",
            "base-model-name-or-path",
            "pretrained-model-name-or-path",
            "pretrained-checkpoint",
            "checkpoint",
        ),
        _LOAD,
    ),
    **dict.fromkeys(
        (
            "dataset",
            "dataset-name",
            "dataset-path",
            "dataset-dir",
            "datasets",
            "data",
            "data-file",
            "data-files",
            "train-file",
            "train-data",
            "train-data-path",
            "training-data",
            "train-dataset",
            "instruct-data",
        ),
        _DATA,
    ),
    **dict.fromkeys(
        ("validation-file", "valid-file", "eval-file", "eval-dataset", "eval-data", "val-data", "eval-instruct-data"),
        _VALID,
    ),
    **dict.fromkeys(("val-set-size", "val-size", "validation-split", "valid-split", "split"), _VALID_FRACTION),
    **dict.fromkeys(("max-steps", "steps", "max-iters", "num-steps", "iters"), _same("train-iters")),
    "train-samples": _same("train-iters", note="iterations are samples / --global-batch-size"),
    **dict.fromkeys(("num-train-epochs", "num-epochs", "epochs", "n-epochs", "epoch"), _EPOCHS),
    **dict.fromkeys(
        ("per-device-train-batch-size", "per-gpu-train-batch-size", "train-batch-size", "batch-size", "micro-batch"),
        _MICRO,
    ),
    **dict.fromkeys(
        (
            "gradient-accumulation-steps",
            "gradient-accumulation",
            "grad-accum",
            "accumulate-grad-batches",
            "num-microbatches",
        ),
        _GLOBAL,
    ),
    **dict.fromkeys(("bf16", "fp16", "fp32", "tf32", "float16", "torch-dtype", "precision", "mixed-precision"), _DTYPE),
    **dict.fromkeys(("lora-r", "r", "rank", "lora-dim", "peft-rank"), _LORA_RANK),
    **dict.fromkeys(("alpha", "peft-alpha"), _same("lora-alpha")),
    **dict.fromkeys(("lora-target", "target-modules", "lora-modules", "lora-target-linear"), _TARGETS),
    **dict.fromkeys(("load-in-4bit", "qlora", "use-4bit", "bnb-4bit-quant-type"), _NF4),
    **dict.fromkeys(("load-in-8bit", "use-8bit", "fp8"), _FP8),
    **dict.fromkeys(
        ("quantization", "quantization-bit", "quantize", "quantization-config"),
        _same("base-precision", note="bf16, fp8 or nf4"),
    ),
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp-config", "zero-stage", "device-map", "use-distributed-optimizer"), _SHARDING
    ),
    **dict.fromkeys(
        ("use-lora", "use-peft", "lora", "peft", "peft-scheme", "finetuning-type", "stage", "do-train"), _LORA_ALWAYS
    ),
    **dict.fromkeys(("warmup-steps", "num-warmup-steps", "lr-warmup-steps", "warmup"), _WARMUP),
    **dict.fromkeys(("warmup-ratio", "lr-warmup-fraction"), _WARMUP_RATIO),
    **dict.fromkeys(("lr-scheduler-type", "lr-scheduler", "lr-decay-style", "scheduler"), _SCHEDULE),
    **dict.fromkeys(("max-grad-norm", "gradient-clip-val", "grad-clip", "max-norm"), _same("clip-grad")),
    **dict.fromkeys(("logging-steps", "log-freq", "log-every"), _same("log-interval")),
    **dict.fromkeys(("save-steps", "ckpt-freq", "save-every"), _same("save-interval")),
    **dict.fromkeys(("eval-steps", "eval-freq", "eval-every"), _same("eval-interval")),
    **dict.fromkeys(
        (
            "max-seq-length",
            "max-seq-len",
            "seq-len",
            "sequence-len",
            "sequence-length",
            "max-length",
            "cutoff-len",
            "model-max-length",
            "block-size",
            "context-length",
            "max-position-embeddings",
        ),
        _LENGTH,
    ),
    **dict.fromkeys(("packing", "sample-packing"), _same("pack")),
    **dict.fromkeys(("gradient-checkpointing", "activation-checkpointing", "use-gradient-checkpointing"), _RECOMPUTE),
    "recompute-granularity": _same("recompute", note="none, selective, full or offload"),
    **dict.fromkeys(
        ("resume-from-checkpoint", "resume-from", "auto-resume"), _same("resume", note="continues from --save")
    ),
    "report-to": _same("tensorboard", note="metrics are in SAVE/metrics.jsonl as well"),
    **dict.fromkeys(
        (
            "adapter-name-or-path",
            "adapter-path",
            "lora-path",
            "lora-weights",
            "lora-model-path",
            "peft-model",
            "peft-model-id",
            "lora-model-dir",
        ),
        _ADAPTER,
    ),
    **dict.fromkeys(("template", "prompt-template", "prompt-style", "chat-template"), _TEMPLATE),
    **dict.fromkeys(("dataset-format", "dataset-type", "data-type", "prompt-format"), _FORMAT),
    **dict.fromkeys(("tp", "tp-size", "tensor-parallel-size", "tensor-parallelism"), _TP),
    **dict.fromkeys(("ep", "ep-size", "expert-parallel-size", "enable-expert-parallel"), _EP),
    **dict.fromkeys(
        ("pp", "pp-size", "pipeline-parallel-size", "pipeline-model-parallel-size"),
        _none("leave it out: there is no pipeline; the layers' experts are split over EP"),
    ),
    **dict.fromkeys(
        ("context-parallel-size", "cp"), _none("leave it out: sequences are not split over processes but by TP")
    ),
    **dict.fromkeys(("num-gpus", "n-gpu", "n-gpus", "gpus-per-node", "num-processes", "nproc", "gpus"), _PROCESSES),
    **dict.fromkeys(("nnodes", "num-nodes", "node-rank", "master-addr", "master-port", "hostfile"), _HOSTS),
    **dict.fromkeys(("local-rank", "local-process-index"), _LEFT_OUT),
    **dict.fromkeys(("max-tokens", "max-gen-len", "n-predict", "num-tokens"), _same("max-new-tokens")),
    "do-sample": _same("temperature", note="above 0 samples"),
    "top-k": _same("top-p", note="a share of probability, not a number of tokens"),
    **dict.fromkeys(("messages", "question", "query", "input", "user-prompt"), _same("instruction")),
    **dict.fromkeys(("optim", "optimizer"), _same("optimizer", note="finetune always uses AdamW")),
    **dict.fromkeys(("adam-beta1", "adam-beta2", "adam-epsilon", "adam-eps"), _ADAM),
    **dict.fromkeys(
        (
            "attn-implementation",
            "use-flash-attn",
            "use-flash-attention",
            "flash-attn",
            "flash-attention",
            "use-cache",
            "trust-remote-code",
            "transformer-impl",
            "use-mcore-models",
            "sequence-parallel",
            "moe-grouped-gemm",
            "moe-token-dispatcher-type",
            "distributed-backend",
            "ddp-backend",
            "ddp-find-unused-parameters",
            "dataloader-num-workers",
            "preprocessing-num-workers",
            "remove-unused-columns",
            "group-by-length",
            "torch-compile",
            "load-best-model-at-end",
            "exit-on-missing-checkpoint",
            "no-load-optim",
            "no-load-rng",
        ),
        _LEFT_OUT,
    ),
    **dict.fromkeys(
        (
            "num-layers",
            "hidden-size",
            "ffn-hidden-size",
            "num-attention-heads",
            "num-query-groups",
            "num-experts",
            "moe-router-topk",
            "tokenizer",
            "tokenizer-type",
            "tokenizer-model",
            "tokenizer-name",
            "tokenizer-path",
            "vocab-size",
            "use-checkpoint-args",
            "position-embedding-type",
        ),
        _FROM_LOAD,
    ),
    **dict.fromkeys(("push-to-hub", "hub-model-id"), _none("leave it out: export the adapter, then `hf upload` it")),
    **dict.fromkeys(("hf-token", "token", "use-auth-token", "hub-token"), _TOKEN),
    "data-seed": _same("seed"),
    **dict.fromkeys(
        ("overwrite-output-dir", "overwrite-output", "force"),
        _either(overwrite="", save="training never overwrites: give a new folder"),
    ),
    **dict.fromkeys(("verbose", "log-level"), _none("write mixtral-run --debug VERB … for tracebacks and warnings")),
}
"""The kit's answer to a flag of another program, without its dashes."""

FOREIGN_VERBS: dict[str, str] = {
    **dict.fromkeys(
        ("train", "sft", "lora", "qlora", "fine-tune", "fine-tuning", "finetuning", "tune", "ft", "peft", "run-sft"),
        "mixtral-run finetune --load MODEL --data-path FILE.jsonl --save FOLDER",
    ),
    **dict.fromkeys(("pre-train", "pretraining", "full"), "mixtral-run pretrain --load MODEL --mock-data"),
    **dict.fromkeys(
        ("merge", "merge-lora", "merge-adapter", "merge-and-unload"),
        "mixtral-run export --adapter ADAPTER --merge --hf-model-path MODEL --output-path FOLDER",
    ),
    **dict.fromkeys(
        (
            "chat",
            "infer",
            "inference",
            "predict",
            "sample",
            "complete",
            "completion",
            "cli",
            "run",
            "ask",
            "api",
            "serve",
        ),
        "mixtral-run generate --load MODEL --adapter ADAPTER --instruction TEXT",
    ),
    **dict.fromkeys(
        ("eval", "evaluate", "validate", "validation"),
        "mixtral-run finetune … --valid-data-path FILE.jsonl, which reports the loss of a validation set",
    ),
    **dict.fromkeys(
        ("download", "pull", "import", "hf-to-megatron", "from-hf", "load"),
        "mixtral-run convert --hf-model-path NAME --output-path FOLDER, which downloads and converts",
    ),
    **dict.fromkeys(("to-hf", "megatron-to-hf"), "mixtral-run convert --from-megatron CHECKPOINT --output-path FOLDER"),
    **dict.fromkeys(
        ("quantize", "quantise", "quantization"),
        "mixtral-run finetune … --base-precision nf4, which quantizes the frozen experts",
    ),
    **dict.fromkeys(
        ("setup", "install", "provision", "init", "deploy", "prepare", "create"), "mixtral-run bootstrap USER@HOST"
    ),
    **dict.fromkeys(("doctor", "diagnose", "debug", "why", "troubleshoot"), "mixtral-run explain WORDS"),
    **dict.fromkeys(("ps", "ls", "list", "queue"), "mixtral-run jobs"),
    **dict.fromkeys(("kill", "cancel"), "mixtral-run stop JOB"),
    **dict.fromkeys(("tail", "log", "follow"), "mixtral-run logs JOB -f"),
    **dict.fromkeys(("get", "copy", "cp", "rsync"), "mixtral-run fetch JOB"),
    **dict.fromkeys(("test", "check", "bench", "benchmark"), "mixtral-run smoke --load CHECKPOINT"),
    **dict.fromkeys(("demo", "try", "quickstart"), "mixtral-run rehearse"),
    **dict.fromkeys(("memory", "estimate", "layout", "layouts"), "mixtral-run plan --gpus 8 --gpu h100"),
    **dict.fromkeys(
        ("preprocess", "preprocess-data", "tokenize", "tokenise"),
        "mixtral-run finetune --data-path FILE.jsonl, which tokenizes by itself",
    ),
    **dict.fromkeys(("inspect", "info", "describe", "show"), "mixtral-run verify --load CHECKPOINT"),
    **dict.fromkeys(("help", "usage", "version"), "mixtral-run --help, or --version"),
}
"""The command of the kit for a verb of another program."""


def answer_to(name: str, known: Collection[str], show: Callable[[str], str]) -> str | None:
    """Return the answer to a setting of another program, or None if the name is not known.

    Args:
        name: the name as given, with dashes or underscores.
        known: the settings that can be given here, with dashes.
        show: writes a setting as it is given here: as a flag, or as a key of a file.
    """
    foreign = FOREIGN_FLAGS.get(name.replace("_", "-").lower())
    if foreign is None:
        return None
    for setting, note in foreign.meant:
        if setting in known:
            return f"write {show(setting)}" + (f" ({note})" if note else "")
    if foreign.meant:
        return f"the kit calls it {show(foreign.meant[0][0])}, which this verb does not have"
    return foreign.note
