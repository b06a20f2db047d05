"""Unsloth: FastLanguageModel as its users call it, with its compiled path for mixtures of experts.

Loading is theirs but for the weights, which are random: unsloth.FastLanguageModel patches transformers, compiles the
model's modules and replaces the experts' forward (unsloth_zoo's split LoRA over grouped_mm). The checkpointing `own` is
theirs as well ("unsloth": activations go to the host from 512 tokens on).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rivals.harness import ALPHA, ATTENTION, EXPERTS, RANK, Ready, random_weights, write_folder

SETTINGS = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def prepare(layers: int, seq: int, arguments: argparse.Namespace) -> Ready:
    """Load and adapt the model with Unsloth. Call it before anything else imports transformers."""
    os.environ.update(SETTINGS, UNSLOTH_COMPILE_LOCATION=str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
    # Before transformers and PEFT, which it changes.
    unsloth: Any = importlib.import_module("unsloth")

    import torch

    checkpointing: Any = "unsloth" if arguments.rival_checkpointing == "own" else False
    with tempfile.TemporaryDirectory(prefix="mixtral-random-") as folder, random_weights():
        write_folder(Path(folder), layers)
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=seq,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            load_in_16bit=True,
            use_gradient_checkpointing=checkpointing,
            local_files_only=True,
        )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        target_modules=[*ATTENTION, *(() if arguments.attention_only else EXPERTS)],
        lora_alpha=ALPHA,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=1,
    )
    unsloth.FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    return Ready(model, lambda: proof_of(model, attention_only=arguments.attention_only))


def proof_of(model: Any, *, attention_only: bool) -> str:
    """Return which of Unsloth's functions computes the experts. Raises RuntimeError if none does."""
    from peft.tuners.lora.layer import ParamWrapper

    experts = next(each for each in model.modules() if type(each).__name__ == "MixtralExperts")
    forward = type(experts).forward
    if "moe_utils" not in forward.__module__:
        raise RuntimeError(f"the experts' forward is {forward.__module__}.{forward.__qualname__}, not Unsloth's")
    adapted = ParamWrapper.forward
    if not attention_only and "moe_utils" not in adapted.__module__:
        raise RuntimeError(f"the adapters' forward is {adapted.__module__}.{adapted.__qualname__}, not Unsloth's")
    backend = sys.modules[forward.__module__].select_moe_backend()
    if backend == "native_torch":
        raise RuntimeError("the experts run one by one (native_torch), not in Unsloth's grouped product")
    return f"{forward.__module__}.{forward.__qualname__}, {backend}"
