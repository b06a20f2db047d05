"""Verbs of other programs, with the command of the kit for each. Standard library only."""

from __future__ import annotations

FOREIGN_VERBS: dict[str, str] = {
    **dict.fromkeys(
        ("train", "sft", "lora", "qlora", "fine-tune", "fine-tuning", "finetuning", "tune", "ft", "peft", "run-sft"),
        "mixtral-run finetune --load MODEL --data-path FILE.jsonl --save FOLDER",
    ),
    **dict.fromkeys(("pre-train", "pretraining"), "mixtral-run pretrain --load MODEL --mock-data"),
    **dict.fromkeys(
        ("full", "full-finetune", "full-finetuning", "full-fine-tuning"),
        "mixtral-run pretrain --load MODEL --data-path FILE.jsonl --save FOLDER",
    ),
    **dict.fromkeys(
        ("merge", "merge-lora", "merge-adapter", "merge-and-unload"),
        "mixtral-run export --adapter ADAPTER --merge --hf-model-path MODEL --output-path FOLDER",
    ),
    **dict.fromkeys(
        ("infer", "inference", "predict", "sample", "complete", "completion", "cli", "run"),
        "mixtral-run generate --load MODEL --adapter ADAPTER --instruction TEXT",
    ),
    **dict.fromkeys(
        ("api", "server", "vllm", "sglang", "start-server", "host"),
        "mixtral-run serve --on HOST --load MODEL --adapter PEFT_DIRECTORY",
    ),
    **dict.fromkeys(("talk", "ask", "interactive", "repl"), "mixtral-run chat --load MODEL --adapter ADAPTER"),
    **dict.fromkeys(("bash", "sh", "ssh", "exec", "attach"), "mixtral-run shell --on HOST"),
    **dict.fromkeys(
        ("eval", "validate", "validation", "score", "judge", "lm-eval"),
        "mixtral-run evaluate --load MODEL --adapter ADAPTER --data-path FILE.jsonl",
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
    **dict.fromkeys(("test", "bench", "benchmark"), "mixtral-run smoke --load CHECKPOINT"),
    **dict.fromkeys(("demo", "try", "quickstart"), "mixtral-run rehearse"),
    **dict.fromkeys(("memory", "estimate", "layout", "layouts"), "mixtral-run plan --gpus 8 --gpu h100"),
    **dict.fromkeys(
        ("check", "check-data", "preprocess", "preprocess-data", "tokenize", "tokenise"),
        "mixtral-run data check FILE; finetune tokenizes by itself",
    ),
    **dict.fromkeys(
        ("dpo", "orpo", "kto", "simpo", "preferences"),
        "mixtral-run align --method dpo, kto, orpo or simpo, which learns from preferences",
    ),
    **dict.fromkeys(
        ("ppo", "grpo", "rlhf", "reward", "rm"),
        "mixtral-run align, which learns from preferences; training with a reward model is not offered",
    ),
    **dict.fromkeys(("inspect", "info", "describe", "show"), "mixtral-run verify --load CHECKPOINT"),
    **dict.fromkeys(("help", "usage", "version"), "mixtral-run --help, or --version"),
}
"""The command of the kit for a verb of another program."""
