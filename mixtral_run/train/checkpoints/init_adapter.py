"""Fine-tuning that continues an adapter: of an earlier run, or one that PEFT trained (`finetune --init-adapter`)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from mixtral_run.config.fields import flag_of
from mixtral_run.config.lora import EXPERT_ADAPTERS, LORA_INITS, TRAINED_ALSO
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.launch import processes
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.given_adapter import PeftDescription, describe_given_adapter
from mixtral_run.weights.manifest.describe import AdapterDescription, BaseDescription, check_adapter_fits, describe_base

if TYPE_CHECKING:
    from mixtral_run.model.mixtral import MixtralModel


def with_adapter_settings(config: FinetuneConfig) -> FinetuneConfig:
    """Return the config with rank, alpha and target modules of --init-adapter, if there is one.

    Raises WeightsError if the adapter cannot be used. A base that cannot be read is reported by `check_training`.
    """
    if config.init_adapter is None:
        return config
    try:
        base = describe_base(config.load)
    except MixtralRunError:
        return config
    lora = describe_init_adapter(config, base).lora
    brought = lora.all_values()
    for name, default in (("init_lora", LORA_INITS[0]), ("expert_adapters", EXPERT_ADAPTERS[0])):
        asked = getattr(config, name)
        if asked not in (default, brought[name]):
            raise ConfigError(
                "--init-adapter brings adapters of another form.",
                where=str(config.init_adapter),
                expected=f"{flag_of(name)} {brought[name]}, or none",
                found=f"{flag_of(name)} {asked}",
                next_command=f"the same command without {flag_of(name)}; or without --init-adapter",
            )
    changed = dataclasses.replace(
        config,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_rank_experts=lora.expert_rank,
        lora_alpha_experts=lora.expert_alpha,
        lora_scaling=lora.scaling,
        init_lora=lora.init,
        expert_adapters=brought["expert_adapters"],
        train_also=tuple(each for each in TRAINED_ALSO if each in (*lora.train_also, *config.train_also)),
        lora_target_modules=lora.target_modules,
    )
    if processes.rank() == 0 and changed != config:
        modules = ", ".join(lora.target_modules)
        report = Report()
        report.say(f"LoRA settings of {config.init_adapter}: {lora.describe()}, {modules}")
        for name, asked in _not_used(config, changed).items():
            report.warn(f"{flag_of(name)} {asked} is not used: the adapter to start from has {getattr(changed, name)}")
    # What the adapter brings must suit the other settings too.
    if changed.train_also != config.train_also:
        changed.check()
    return changed


def _not_used(config: FinetuneConfig, changed: FinetuneConfig) -> dict[str, object]:
    """Return the settings that were given and differ from those of the adapter. Defaults may not have been given."""
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    asked = {
        name: getattr(config, name) for name in ("lora_rank", "lora_alpha", "lora_rank_experts", "lora_alpha_experts")
    }
    return {name: value for name, value in asked.items() if value not in (defaults[name], getattr(changed, name))}


def describe_init_adapter(config: FinetuneConfig, base: BaseDescription) -> AdapterDescription:
    """Return the adapter to start from. Raises WeightsError if it cannot be used, or belongs to another base."""
    assert config.init_adapter is not None
    adapter = describe_given_adapter(config.init_adapter, base.architecture)
    check_adapter_fits(adapter, base)
    return adapter


def load_init_adapter(config: FinetuneConfig, base: BaseDescription, model: MixtralModel, report: Report) -> None:
    """Fill the adapters of the model from --init-adapter, if there is one. All ranks must call."""
    if config.init_adapter is None or config.resume:
        return
    # Here, because the command that starts a job needs the settings of the adapter, and no Megatron.
    from mixtral_run.train.checkpoints.checkpoint import load_adapter

    adapter = describe_init_adapter(config, base)
    load_adapter(model, adapter)
    named = adapter.base_name if isinstance(adapter, PeftDescription) else None
    trained = f"; its config names the base {named}, which is not checked" if named else ""
    report.say(f"Starting from the adapter {config.init_adapter}{trained}")
