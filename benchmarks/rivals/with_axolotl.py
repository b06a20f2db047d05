"""axolotl: a configuration as its users write it, loaded by its own ModelLoader, with ScatterMoE LoRA and Liger.

Loading is theirs but for the weights, which are random. The configuration is validated as the command `axolotl train`
does it, which also switches its kernels for adapters on attention on. The checkpointing `own` is
`gradient_checkpointing: true`. What is fetched from a hub at run time is not measured: SonicMoE, and the layers that
transformers would exchange for `use_kernels`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rivals.harness import (
    ALPHA,
    ATTENTION,
    EXPERT_PARAMETERS,
    RANK,
    Ready,
    random_weights,
    write_folder,
)
from benchmarks.rivals.placeholders import placeholders

SETTINGS = {
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # As its command sets it.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
UNUSED = ("wandb", "evaluate", "fastcore", "posthog")
"""Packages that axolotl imports for other purposes: logging, metrics, sharded loading, telemetry."""


def configuration(folder: str, seq: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the file that a user would write."""
    return {
        "base_model": folder,
        "sequence_len": seq,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "optimizer": "adamw_torch_fused",
        "datasets": [{"path": "unused.jsonl", "type": "alpaca"}],
        "adapter": "lora",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "lora_target_modules": list(ATTENTION),
        "lora_target_parameters": None if arguments.attention_only else list(EXPERT_PARAMETERS),
        "bf16": True,
        "tf32": True,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": arguments.rival_checkpointing == "own",
        "plugins": [
            "axolotl.integrations.kernels.KernelsPlugin",
            "axolotl.integrations.liger.LigerPlugin",
        ],
        "use_kernels": True,
        "use_scattermoe": True,
        "liger_rope": True,
        "liger_rms_norm": True,
        # Liger's activation would replace the experts, which ScatterMoE computes.
        "liger_glu_activation": False,
        "liger_fused_linear_cross_entropy": True,
    }


def prepare(layers: int, seq: int, arguments: argparse.Namespace) -> Ready:
    """Load and adapt the model with axolotl."""
    os.environ.update(SETTINGS)
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="mixtral-random-") as folder, placeholders(*UNUSED) as replaced:
        write_folder(Path(folder), layers)
        cfg = validated(configuration(folder, seq, arguments))

        from axolotl.loaders.model import ModelLoader

        with random_weights():
            model, _ = ModelLoader(cfg, AutoTokenizer.from_pretrained(folder)).load()
    model.train()
    kernels = [name for name in ("lora_qkv_kernel", "lora_o_kernel") if cfg[name]]
    return Ready(model, lambda: proof_of(model, kernels, sorted(replaced)))


def validated(words: dict[str, Any]) -> Any:
    """Return axolotl's configuration as its command line makes it from a file."""
    import torch
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import normalize_cfg_datasets, normalize_config, prepare_plugins, validate_config
    from axolotl.utils.dict import DictDefault

    given = DictDefault({name: value for name, value in words.items() if value is not None})
    prepare_plugins(given)
    on_gpu = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if on_gpu else (0, 0)
    capabilities = {
        "bf16": True,
        "fp8": (major, minor) >= (9, 0),
        "tf32": True,
        "n_gpu": 1,
        "compute_capability": f"sm_{major}{minor}" if on_gpu else None,
    }
    environment = {"torch_version": torch.__version__.split("+")[0]}
    cfg = validate_config(given, capabilities=capabilities, env_capabilities=environment)
    normalize_config(cfg)
    normalize_cfg_datasets(cfg)
    PluginManager.get_instance().cfg = cfg
    return cfg


def proof_of(model: Any, kernels: list[str], replaced: list[str]) -> str:
    """Return which of axolotl's functions computes the experts. Raises RuntimeError if none does."""
    from peft.tuners.lora.layer import ParamWrapper

    if (found := model.config._experts_implementation) != "scattermoe":
        raise RuntimeError(f"the experts run as {found}, not scattermoe")
    if not getattr(ParamWrapper.forward, "_scattermoe_fastpath", False):
        raise RuntimeError("the experts' adapters are merged into the weights, not fused with ScatterMoE's kernel")
    experts = [each for each in model.modules() if type(each).__name__ == "MixtralExperts"]
    if not experts:
        raise RuntimeError("the experts were replaced by another class")
    return f"ScatterMoE LoRA, {', '.join(kernels) or 'no kernel'} on attention; placeholders: {', '.join(replaced)}"
