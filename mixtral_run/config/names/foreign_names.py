"""Names that other programs have for settings of the kit, with the kit's own. Standard library only.

The names come from HF's Trainer, PEFT, TRL, Axolotl, LLaMA-Factory, Unsloth, torchtune, Megatron-LM and vLLM.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

_CLOSE = 0.75
"""Least similarity, from 0 to 1, of a misspelled name."""


@dataclass(frozen=True)
class ForeignName:
    """The kit's answer to a name of another program.

    meant: the kit's settings, each with what to write where units or values differ; the first one that the verb has is
    named. note: the answer if the verb has none of them. `{lora-rank}` in a text stands for that setting of the kit.
    """

    meant: tuple[tuple[str, str], ...] = ()
    note: str = ""


def _same(*names: str, note: str = "") -> ForeignName:
    return ForeignName(tuple((name, note) for name in names))


def _either(**notes: str) -> ForeignName:
    return ForeignName(tuple((name.replace("_", "-"), note) for name, note in notes.items()))


def _none(note: str) -> ForeignName:
    return ForeignName((), note)


_SAVE = _same("save", "output-path", "output-file")
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
_CP = _same("context-parallel-size", note="processes that share each row of tokens")
_EP = _same("expert-model-parallel-size")
_PROCESSES = _same("nproc-per-node", note="processes on this machine; the default is one per GPU")
_HOSTS = _same("on", note="with the value HOST,HOST; or start the verb under torchrun")
_VALID_FRACTION = _either(valid_fraction="a number between 0 and 1", valid_data_path="a file of its own")
_SHARDING = _none("leave it out: the kit splits the model over the processes by itself, by TP and EP")
_LORA_ALWAYS = _none("leave it out: finetune always trains LoRA adapters, pretrain always all weights")
_LEFT_OUT = _none("leave it out: the kit decides it by itself")
_ADAPTERS_ONLY = _none(
    "leave it out: finetune always trains LoRA adapters (qlora: {base-precision} nf4); an adapter to start from is "
    "{init-adapter}"
)
_ANSWERS_ONLY = _none("leave it out: only the answers are learned; records of the shape `text` are learned whole")
_ADAMW_ALWAYS = ForeignName((("optimizer", ""),), "leave it out: finetune always uses AdamW")
_METRICS = _none("leave it out: metrics go to SAVE/tensorboard and SAVE/metrics.jsonl, and nowhere else")
_LOG_TO = ForeignName((("log-to", "with wandb or mlflow; TensorBoard's files are in SAVE/tensorboard"),), _METRICS.note)
_WANDB = _none("leave it out: --log-to wandb takes the project, the entity and more from wandb's variables (WANDB_…)")
_PER_EPOCH = "in iterations: examples / {global-batch-size} is one epoch"
_FROM_LOAD = _none("leave it out: the sizes and the tokenizer are read from --load")
_ADAM = _none("leave it out: AdamW runs with its usual values")
_TOKEN = _none("a token is never given as a flag: log in with `hf auth login`, or bootstrap --hf-token-file FILE")

FOREIGN_FLAGS: dict[str, ForeignName] = {
    **dict.fromkeys(("learning-rate", "peak-lr", "max-lr"), _same("lr")),
    **dict.fromkeys(("min-learning-rate", "lr-min"), _same("min-lr")),
    **dict.fromkeys(("output-dir", "output", "out", "out-dir", "save-dir", "output-folder", "checkpoint-dir"), _SAVE),
    # The verbs' own words for one thing differ: what one verb writes with --save, another writes with --output-path.
    **dict.fromkeys(("save", "output-path", "output-file"), _SAVE),
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
            # Each is the kit's own name of the base model in other verbs.
            "load",
            "hf-model-path",
        ),
        _LOAD,
    ),
    **dict.fromkeys(
        (
            "dataset",
            "dataset-name",
            "dataset-path",
            "dataset-dir",
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
    "datasets": _same("data-path", note="a list of paths; what Axolotl calls type is {data-format}"),
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
    **dict.fromkeys(("tiled-mlp", "tiled-mlp-num-shards"), _same("expert-chunks", note="parts of the tokens")),
    "recompute-granularity": _same("recompute", note="none, selective, except-attention, full or offload"),
    "recompute-num-layers": _same("recompute-layers", note="counted from the first, as with Megatron's method block"),
    **dict.fromkeys(
        ("resume-from-checkpoint", "resume-from", "auto-resume"), _same("resume", note="continues from --save")
    ),
    "saves-per-epoch": _same("save-interval", note=_PER_EPOCH),
    "evals-per-epoch": _same("eval-interval", note=_PER_EPOCH),
    "save-total-limit": _same("keep-last"),
    **dict.fromkeys(
        (
            "wandb-project",
            "wandb-entity",
            "wandb-run-id",
            "wandb-watch",
            "wandb-log-model",
        ),
        _WANDB,
    ),
    **dict.fromkeys(("report-to", "wandb", "use-wandb"), _LOG_TO),
    "wandb-name": ForeignName((("run-name", ""),), _METRICS.note),
    **dict.fromkeys(("run-name", "logging-dir", "tensorboard-dir"), _METRICS),
    **dict.fromkeys(
        ("train-on-inputs", "train-on-prompt", "mask-prompt", "completion-only-loss", "assistant-only-loss"),
        _ANSWERS_ONLY,
    ),
    **dict.fromkeys(
        ("lora-modules-to-save", "modules-to-save", "additional-target"),
        ForeignName(
            (("train-also", "some of embeddings, lm_head, norms, router"),),
            "leave it out: {train-also} of finetune trains embeddings, lm_head, norms or router with the adapters",
        ),
    ),
    **dict.fromkeys(
        ("use-dora", "dora", "lora-dora", "peft-use-dora"),
        _none(
            "leave it out: DoRA is not there, since every step would need the norms of all expert weights, and neither "
            "PEFT nor vLLM loads it for experts (docs/concepts/adapters.md)"
        ),
    ),
    **dict.fromkeys(("use-rslora", "rslora"), _same("lora-scaling", note="with the value rslora")),
    **dict.fromkeys(("loraplus-lr-ratio", "loraplus-ratio"), _same("lora-plus-ratio")),
    **dict.fromkeys(
        ("init-lora-weights", "lora-init", "pissa-init", "use-pissa"),
        _same("init-lora", note="default, pissa or olora"),
    ),
    **dict.fromkeys(("router-aux-loss-coef", "moe-aux-loss-coeff", "aux-loss-coef"), _same("router-aux-loss")),
    "adapter": _ADAPTERS_ONLY,
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
    **dict.fromkeys(("cp", "cp-size", "context-parallelism", "sequence-parallel-degree"), _CP),
    **dict.fromkeys(("num-gpus", "n-gpu", "n-gpus", "gpus-per-node", "num-processes", "nproc", "gpus"), _PROCESSES),
    **dict.fromkeys(("nnodes", "num-nodes", "node-rank", "master-addr", "master-port", "hostfile"), _HOSTS),
    **dict.fromkeys(("local-rank", "local-process-index"), _LEFT_OUT),
    **dict.fromkeys(("max-tokens", "max-gen-len", "n-predict", "num-tokens"), _same("max-new-tokens")),
    "do-sample": _same("temperature", note="above 0 samples"),
    "top-k": _same("top-p", note="a share of probability, not a number of tokens"),
    **dict.fromkeys(("messages", "question", "query", "input", "user-prompt"), _same("instruction")),
    **dict.fromkeys(("optim", "optimizer"), _ADAMW_ALWAYS),
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


def setting_meant(name: str, known: Collection[str]) -> str | None:
    """Return the setting of `known` that stands for one of another program, or None; see `answer_to`."""
    foreign = _foreign(name)
    return next((setting for setting, _ in foreign.meant if setting in known), None) if foreign else None


def answer_to(name: str, known: Collection[str], show: Callable[[str], str]) -> str | None:
    """Return the answer to a setting of another program, or None if the name is not known.

    Args:
        name: the name as given, with dashes or underscores.
        known: the settings that can be given here, with dashes.
        show: writes a setting as it is given here: as a flag, or as a key of a file.
    """
    foreign = _foreign(name)
    if foreign is None:
        return None
    setting = setting_meant(name, known)
    if setting is not None:
        note = dict(foreign.meant)[setting]
        answer = f"write {show(setting)}" + (f" ({note})" if note else "")
    elif foreign.note:
        answer = foreign.note
    elif _with_dashes(name) in dict(foreign.meant):
        answer = "leave it out: other verbs have it, this one does not"
    else:
        answer = f"the kit calls it {show(foreign.meant[0][0])}, which this verb does not have"
    return re.sub(r"\{([a-z-]+)\}", lambda found: show(found[1]), answer)


def answer_to_similar(name: str, known: Collection[str], show: Callable[[str], str]) -> str | None:
    """Return the answer to a misspelled setting of another program, or None if no name is close. See `answer_to`."""
    for close in difflib.get_close_matches(_with_dashes(name), FOREIGN_FLAGS, 1, cutoff=_CLOSE):
        answer = answer_to(close, known, show)
        return f"if {show(close)} is meant, {answer}"
    return None


def _foreign(name: str) -> ForeignName | None:
    return FOREIGN_FLAGS.get(_with_dashes(name))


def _with_dashes(name: str) -> str:
    return name.replace("_", "-").lower()
