"""Loading the model of a verb: the base and, if there is one, the adapter, in the requested precision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.precision import StoredBaseConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, TrainingConfig
from mixtral_run.errors import ConfigError
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.adapters.trained_also import remember_base
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.model.start_from_weights import start_from_weights
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.checkpoint import load_adapter, load_base
from mixtral_run.train.quantized_experts import CacheOptions
from mixtral_run.train.steps.warm_up import warm_up
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription, check_adapter_fits

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHECKPOINT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def pick_dtype(wanted: str, base: BaseDescription, device: torch.device) -> torch.dtype:
    """Return the dtype of the model. auto: the checkpoint's, but bf16 on GPUs and fp32 on a CPU for float16."""
    if wanted != "auto":
        return DTYPES[wanted]
    fallback = torch.bfloat16 if device.type == "cuda" else torch.float32
    return CHECKPOINT_DTYPES.get(base.dtype, fallback)


def lora_settings(adapter: AdapterDescription) -> LoraSettings:
    """Return the settings of a trained adapter for inference, without dropout."""
    return dataclasses.replace(adapter.lora, dropout=0.0)


def load_for_training(
    config: LaunchConfig,
    base: BaseDescription,
    mesh: Mesh,
    lora: LoraSettings | None,
    *,
    recompute: str,
    base_precision: str = "bf16",
    cache: CacheOptions | None = None,
) -> MixtralModel:
    """Return the base with new adapters, in training mode. cache: see `load_base`. All ranks must call."""
    dtype = pick_dtype(config.dtype, base, mesh.device)
    chunks, attention = 1, "bf16"
    if isinstance(config, FinetuneConfig):
        chunks, attention = config.expert_chunks or 1, config.attention_precision
    again = config.recompute_layers if isinstance(config, TrainingConfig) else None
    settings = ModelSettings(dtype, True, lora, recompute, base_precision, config.kernels, chunks, attention, again)
    model = _build(base, settings, mesh, cache, lambda: warm_up(mesh, dtype))
    if not (isinstance(config, FinetuneConfig) and (config.resume or config.init_adapter)):
        # Otherwise a checkpoint has the start.
        start_from_weights(model)
    if isinstance(config, FinetuneConfig | PretrainConfig) and config.router_aux_loss:
        model.balance_routers(config.router_aux_loss)
    return model.train()


def load_for_inference(
    config: LaunchConfig,
    base: BaseDescription,
    mesh: Mesh,
    adapter: AdapterDescription | None,
    report: Report | None = None,
) -> MixtralModel:
    """Return the base with its adapter, in evaluation mode without sequence parallelism. All ranks must call.

    report: receives the messages about the quantized cache.
    """
    lora = lora_settings(adapter) if adapter is not None else None
    precision, cache = "bf16", None
    if isinstance(config, StoredBaseConfig):
        precision = config.base_precision
        cache = CacheOptions(config.quantized_cache, report or Report.silent())
    # Generation passes have one token, which sequence parallelism cannot split.
    dtype = pick_dtype(config.dtype, base, mesh.device)
    settings = ModelSettings(dtype, False, lora, base_precision=precision, kernels=config.kernels)
    model = _build(base, settings, mesh, cache)
    if adapter is not None:
        check_adapter_fits(adapter, loaded(model, base))
        remember_base(model, lora)
        load_adapter(model, adapter)
    return model.eval().requires_grad_(False)


def loaded(model: MixtralModel, base: BaseDescription) -> BaseDescription:
    """Return the description with the complete fingerprint of the loaded weights."""
    return dataclasses.replace(base, fingerprint=model.base_fingerprint)


def _build(
    base: BaseDescription,
    settings: ModelSettings,
    mesh: Mesh,
    cache: CacheOptions | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> MixtralModel:
    try:
        model = build_model(base.architecture, settings, mesh)
        load_base(model, base, cache, meanwhile)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "The model does not fit on the GPU in this layout.",
            where=f"rank {mesh.rank}, {mesh.device}",
            found=str(error).splitlines()[0],
            next_command="a larger --expert-model-parallel-size or --tensor-model-parallel-size, on more GPUs",
        ) from error
    return model
