"""Everything that can be found wrong with a training run before a process is started, told at once."""

from __future__ import annotations

from pathlib import Path

from mixtral_run.checkpoints import LATEST, BaseDescription, check_adapter_fits, describe_adapter, describe_base
from mixtral_run.config import DataConfig, FinetuneConfig, GenerateConfig, LaunchConfig
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.fitting import memory_error
from mixtral_run.train.data import batch_size_faults
from mixtral_run.train.pairs import read_pairs
from mixtral_run.weights.staging import disk_faults


def check_training(config: DataConfig, world_size: int) -> BaseDescription:
    """Check settings, base, layout, data file and output folder. Raises one error with all that is wrong."""
    errors: list[MixtralRunError] = []
    replicas = max(world_size // config.tensor_model_parallel_size, 1)
    faults = batch_size_faults(config.global_batch_size, config.micro_batch_size, replicas)
    base = None
    try:
        base = describe_base(config.load)
        faults += layout_faults(config, base)
    except MixtralRunError as error:
        errors.append(error)
    if config.data_path is not None:
        try:
            read_pairs(config.data_path)
        except MixtralRunError as error:
            errors.append(error)
    if isinstance(config, FinetuneConfig):
        faults += output_faults(config.save, resume=config.resume)
        if base is not None:
            faults += disk_faults(config.save, adapter_bytes(config, base))
            refusal = memory_error(config, base, world_size) if not faults else None
            errors += [refusal] if refusal is not None else []
    if faults:
        errors.append(ConfigError("The settings cannot be used as they are.", faults=faults))
    if errors:
        raise joined(errors)
    assert base is not None
    return base


def adapter_bytes(config: FinetuneConfig, base: BaseDescription) -> int:
    """What all of a run's checkpoints take: the adapter and AdamW's two moments, in fp32, each time one is saved."""
    parameters = base.architecture.num_adapter_parameters(config.lora_rank, config.lora_target_modules)
    return 3 * 4 * parameters * (config.train_iters // config.save_interval + 1)


def layout_faults(config: LaunchConfig, base: BaseDescription) -> list[str]:
    """What keeps the base from being split as the config says."""
    return base.architecture.layout_faults(config.tensor_model_parallel_size, config.expert_model_parallel_size)


def output_faults(save: Path, *, resume: bool) -> list[str]:
    """What keeps adapters from being written into `save`."""
    if save.exists() and not save.is_dir():
        return [f"--save {save}: expected a folder; found a file"]
    if resume:
        return [] if (save / LATEST).exists() else [f"--resume: found no checkpoint in --save {save}"]
    if save.is_dir() and any(save.iterdir()):
        return [f"--save {save}: expected a new or empty folder, or --resume; found files"]
    return []


def joined(errors: list[MixtralRunError]) -> MixtralRunError:
    """One error that tells all of them; of the first one's class, so that its exit code stands."""
    if len(errors) == 1:
        return errors[0]
    lines = [str(error).replace("\n", "\n    ") for error in errors]
    return type(errors[0])(f"{len(errors)} things stand in the way.", faults=lines)


def check_inference(config: GenerateConfig) -> None:
    """Check base, layout and adapter. Raises one error with all that is wrong."""
    errors: list[MixtralRunError] = []
    try:
        base = describe_base(config.load)
        faults = layout_faults(config, base)
        if faults:
            errors.append(ConfigError("The settings cannot be used as they are.", faults=faults))
        if config.adapter is not None:
            check_adapter_fits(describe_adapter(config.adapter), base)
    except MixtralRunError as error:
        errors.append(error)
    if errors:
        raise joined(errors)
