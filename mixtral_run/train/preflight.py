"""Checks of a job before any process starts. All problems are reported together."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.fields import SETTINGS_ERROR, flag_of
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.lora import has_frozen_start, module_rank
from mixtral_run.config.verbs.generate import GenerateConfig, InferenceConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, RunConfig, TrainingConfig
from mixtral_run.errors import ConfigError, MixtralRunError, joined
from mixtral_run.launch import processes
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.kernels.requirements import EIGHT_BIT_ALIGNMENT, attention_problems, kernel_problems
from mixtral_run.planner.available import available_gpu
from mixtral_run.planner.choose import inference_memory_error, settled, training_memory_error, weight_bytes_each
from mixtral_run.planner.memory_model import SAVED_TENSORS
from mixtral_run.results.run_files import ALL_FILES
from mixtral_run.run_lock import LOCK_NAME, lock_file_of, lock_problems
from mixtral_run.terminal.report import Report
from mixtral_run.train.checkpoints.newest_good import ITERATIONS, newest_good
from mixtral_run.train.checkpoints.resume_checks import check_full_resume, check_not_complete, full_checkpoint_bytes
from mixtral_run.train.checkpoints.run_folder import PARTIAL, additional_bytes, num_checkpoints
from mixtral_run.train.data.reading.examples import ReadOptions, read_examples
from mixtral_run.train.data.reading.prompts import read_prompts
from mixtral_run.train.data.samples import batch_size_problems
from mixtral_run.train.data.sources import TrainingData, open_data
from mixtral_run.train.data.templates.open_template import file_problems
from mixtral_run.train.model_limits import length_problems, recompute_problems, report_notes
from mixtral_run.train.outcome.log_to import logger_problems
from mixtral_run.weights.adapter.given_adapter import describe_given_adapter
from mixtral_run.weights.hf.hub import HubModel, with_models_here
from mixtral_run.weights.io.atomic_folder import NO_SPACE, disk_problems, on_one_disk, writing_problems
from mixtral_run.weights.manifest.adapter_files import TOKENIZER
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import (
    AdapterDescription,
    BaseDescription,
    check_adapter_fits,
    describe_adapter,
    describe_base,
    describe_trained,
)
from mixtral_run.weights.manifest.manifest import UNKNOWN_FINGERPRINT

JobConfigT = TypeVar("JobConfigT", bound=TrainingConfig | InferenceConfig)

_NOTHING_TO_RESUME = "--resume: found no checkpoint"
_NOT_EMPTY = "expected a new or empty folder, or --resume; found files"


def check_training(config: TrainingConfig, world_size: int) -> BaseDescription:
    """Check settings, base, layout, data files and output folder. Raises one error with all problems."""
    errors: list[MixtralRunError] = []
    base = None
    try:
        base = describe_base(config.load)
    except MixtralRunError as error:
        errors.append(error)
    if errors or _errors(config, world_size, base, reads_data=False):
        # The data are read only for their own problems, which is quicker than to tokenize them.
        raise joined(errors + _errors(config, world_size, base, reads_data=True))
    assert base is not None
    report_notes(base, Report())
    report = Report() if processes.rank() == 0 else Report.silent()
    data = open_data(config, base, report, verify=True)
    _held[:] = [data]
    if not config.knows_iterations:
        replicas = world_size // ((config.tensor_model_parallel_size or 1) * config.context_size)
        batch = config.global_batch_size or config.micro_batch_size * replicas
        config = config.with_iterations(data.num_samples, batch)
        if errors := _errors(config, world_size, base, reads_data=False, iterations_are_new=True):
            raise joined(errors)
    return base


_held: list[TrainingData] = []
"""The data of the job that this process starts: as long as they are open, no other job removes their cache."""


def with_base_here(config: JobConfigT) -> JobConfigT:
    """Return the config with --load as a directory; a model on the hub is downloaded.

    Before the download everything that needs no weights is checked, and raised as by `check_training` and
    `check_inference`.
    """
    report = Report() if processes.rank() == 0 else Report.silent()
    return with_models_here(config, report, lambda model: _check_before_download(config, model))


def _check_before_download(config: TrainingConfig | InferenceConfig, model: HubModel) -> None:
    base = BaseDescription(Path(model.name), model.architecture, model.dtype, UNKNOWN_FINGERPRINT)
    config = settled(config, base)
    if isinstance(config, TrainingConfig):
        errors = _errors(config, processes.process_count(config), base, reads_data=True)
    else:
        errors = _start_errors(config) + _prompt_errors(config)
        problems = layout_problems(config, base)
        errors += [ConfigError(SETTINGS_ERROR, problems=problems)] if problems else []
    if errors:
        raise joined(errors)


def _start_errors(config: LaunchConfig) -> list[MixtralRunError]:
    """Return the error of a layout that does not fit the processes of the job."""
    try:
        processes.num_processes(config)
    except MixtralRunError as error:
        return [error]
    return []


def _errors(
    config: TrainingConfig,
    world_size: int,
    base: BaseDescription | None,
    *,
    reads_data: bool,
    iterations_are_new: bool = False,
) -> list[MixtralRunError]:
    """Return the problems of settings, data files and output folder.

    Args:
        config: of the run. Without its iterations, which --epochs leaves open, some checks are left out.
        world_size: processes of the job.
        base: None if it cannot be used; then some checks are left out.
        reads_data: read the data files as well.
        iterations_are_new: the settings were not checked with the iterations that --epochs are.
    """
    errors = _start_errors(config)
    problems = config.warmup_problems() if iterations_are_new else []
    if not errors:
        tp = config.tensor_model_parallel_size
        replicas = 1 if tp is None else world_size // (tp * config.context_size)
        problems += batch_size_problems(config.global_batch_size, config.micro_batch_size, replicas)
    fits = not errors
    if base is not None:
        problems += layout_problems(config, base)
        problems += length_problems("--seq-length", config.seq_length, base)
        problems += recompute_problems(config.recompute_layers, base)
        problems += start_problems(config, base) if isinstance(config, FinetuneConfig) else []
    for setting in DATA_SETTINGS if reads_data else ():
        texts = getattr(config, setting, ())
        if texts:
            try:
                read_examples(texts, ReadOptions.of(config), setting).check()
            except MixtralRunError as error:
                errors.append(error)
    if isinstance(config, PretrainConfig) and config.metrics_file is not None:
        file = config.metrics_file
        problems += writing_problems(file.parent, f"--metrics-file {file}")
        problems += lock_problems(lock_file_of(file), f"--metrics-file {file}")
    problems += file_problems(config.chat_template)
    start = 0
    if isinstance(config, RunConfig) and config.save is not None:
        problems += logger_problems(config.log_to)
        unwritable = output_problems(config.save, resume=config.resume)
        problems += unwritable
        if base is not None and config.resume and not unwritable:
            try:
                start = _start_of(config, base)
            except MixtralRunError as error:
                errors.append(error)
        if base is not None:
            needed = checkpoint_bytes(config, base, start) if config.knows_iterations else 0
            problems += disk_problems(config.save, needed)
    if base is not None and fits and not problems:
        refusal = training_memory_error(config, base, world_size)
        errors += [refusal] if refusal is not None else []
    if problems:
        errors.append(ConfigError(SETTINGS_ERROR, problems=problems, next_command=_next_step(config, problems)))
    return errors


def check_resume(config: FinetuneConfig, base: BaseDescription) -> AdapterDescription:
    """Return the adapter that --resume continues from.

    Raises ConfigError or WeightsError if it cannot continue, RunCompleteError if the run has reached its end.
    """
    return _check_continues(config, base, describe_adapter(config.save))


def _start_of(config: RunConfig, base: BaseDescription) -> int:
    """Return the iteration after which --resume continues; 0 if auto finds none. Raises as `check_resume` does."""
    if isinstance(config, PretrainConfig):
        trained = newest_good(config.folder, describe_trained).adapter if config.resume == "auto" else None
        if config.resume == "auto" and trained is None:
            return 0
        return check_full_resume(config, base, trained).iteration
    assert isinstance(config, FinetuneConfig)
    if config.resume != "auto":
        return check_resume(config, base).iteration
    adapter = newest_good(config.save, describe_adapter).adapter
    return 0 if adapter is None else _check_continues(config, base, adapter).iteration


def checkpoint_bytes(config: RunConfig, base: BaseDescription, start: int) -> int:
    """Return the free bytes that the checkpoints need. start: the iteration after which the run continues."""
    if isinstance(config, PretrainConfig):
        num_bytes = full_checkpoint_bytes(config, base, start)
    else:
        assert isinstance(config, FinetuneConfig)
        num_bytes = adapter_bytes(config, base, start)
    return additional_bytes(config, start, num_bytes // num_checkpoints(config, start))


def _check_continues(config: FinetuneConfig, base: BaseDescription, adapter: AdapterDescription) -> AdapterDescription:
    """Return the adapter. Raises as `check_resume` does if the run cannot continue from it."""
    check_adapter_fits(adapter, base)
    _check_same_verb(config, adapter)
    _check_same_lora(config, adapter)
    check_not_complete(config, adapter.folder, adapter.iteration, adapter.validation)
    return adapter


def _check_same_verb(config: FinetuneConfig, adapter: AdapterDescription) -> None:
    """Raise ConfigError if the checkpoint is of another verb, or of another method of `align`."""
    verbs = [
        "finetune" if method is None else f"align --method {method}"
        for method in (adapter.training.get("method"), getattr(config, "method", None))
    ]
    if verbs[0] != verbs[1]:
        raise ConfigError(
            "--resume continues a run with the loss that it was started with.",
            where=str(adapter.folder),
            expected=verbs[0],
            found=verbs[1],
            next_command=f"mixtral-run {verbs[0]} … --resume; or {verbs[1]} with --init-adapter {adapter.folder} and "
            "another --save",
        )


def _check_same_lora(config: FinetuneConfig, adapter: AdapterDescription) -> None:
    """Raise ConfigError if the run's adapters are not those of the checkpoint."""
    settings = (adapter.lora, LoraSettings.from_config(config))
    saved, asked = (each.all_values() for each in settings)
    problems = [
        f"{flag_of(name)}: the checkpoint has {_shown(saved[name])}; found {_shown(asked[name])}"
        for name in saved
        # A run may continue with another dropout.
        if saved[name] != asked[name] and name != "lora_dropout"
    ]
    if problems:
        flags = [f"--lora-rank {saved['lora_rank']}", f"--lora-alpha {saved['lora_alpha']:g}"]
        others = [name for name in saved if name not in ("lora_rank", "lora_alpha", "lora_dropout")]
        flags += [
            f"{flag_of(name)} {_shown(saved[name])}"
            for name in others
            if saved[name] not in (None, []) and (saved[name] != asked[name] or name == "lora_target_modules")
        ]
        flags += [
            f"without {flag_of(name)}" for name in others if saved[name] in (None, []) and saved[name] != asked[name]
        ]
        raise ConfigError(
            "--resume needs the settings that the adapter was started with.",
            problems=problems,
            next_command=f"the same command with {' '.join(flags)}; or without --resume, with a new --save",
        )


def _shown(value: object) -> str:
    """Return a setting as the command line has it."""
    if isinstance(value, list):
        return ",".join(value) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def adapter_bytes(config: FinetuneConfig, base: BaseDescription, start: int) -> int:
    """Return the bytes of the checkpoints that are there at once: adapters and AdamW's two moments in fp32.

    Those that --early-stopping-patience adds are not counted, because nobody knows how many evaluations are the best.
    """
    parameters = base.architecture.num_adapter_parameters(config)
    per_checkpoint = SAVED_TENSORS[has_frozen_start(config)] * parameters
    per_checkpoint += 3 * base.architecture.num_trained_also(config.train_also) if config.train_also else 0
    return 4 * per_checkpoint * num_checkpoints(config, start)


def start_problems(config: FinetuneConfig, base: BaseDescription) -> list[str]:
    """Return why the adapters cannot start from the weights of the base: a weight has not enough ranks."""
    if not has_frozen_start(config):
        return []
    a = base.architecture
    sides = {
        "linear_qkv": (a.hidden_size, a.qkv_size),
        "linear_proj": (a.hidden_size, a.projection_size),
        "linear_fc1": (a.hidden_size, 2 * a.ffn_hidden_size),
        "linear_fc2": (a.hidden_size, a.ffn_hidden_size),
    }
    return [
        f"--init-lora {config.init_lora}: expected a rank of at most {min(sides[module])} for {module}; "
        f"found {module_rank(config, module)}"
        for module in config.lora_target_modules
        if module_rank(config, module) > min(sides[module])
    ]


def reserved_bytes(config: FinetuneConfig, base: BaseDescription) -> int:
    """Return the bytes that the run's own checkpoints will take on the disk of the base."""
    if not config.knows_iterations or not on_one_disk(config.save, base.folder):
        return 0
    start = describe_adapter(config.save).iteration if config.resume else 0
    return checkpoint_bytes(config, base, start)


def layout_problems(config: LaunchConfig, base: BaseDescription) -> list[str]:
    """Return the reasons why the base cannot be split into the config's layout, or computed with its kernels."""
    problems = base.architecture.layout_problems(*config.layout_sizes) if config.has_layout else []
    in_8_bit = isinstance(config, FinetuneConfig) and config.attention_precision == "fp8"
    if config.kernels != "auto" or in_8_bit:
        gpu = available_gpu(config.device, processes.process_count(config))
        capability = gpu.compute_capability if gpu is not None else None
        problems += kernel_problems(capability, config.kernels)
        if in_8_bit and not problems:
            widths = base.architecture.attention_widths(config.layout_sizes[0]) if config.has_layout else ()
            able = base.architecture.aligned_tensor_sizes(EIGHT_BIT_ALIGNMENT)
            problems += attention_problems(capability, config.kernels, weight_bytes_each(config, base), widths, able)
    return problems


def output_problems(save: Path, *, resume: str | None) -> list[str]:
    """Return the reasons why adapters cannot be written into `save`. resume: the value of --resume."""
    problems = writing_problems(save, f"--save {save}") or lock_problems(save / LOCK_NAME, f"--save {save}")
    if problems:
        return problems
    if resume == "auto" and any(save.glob(ITERATIONS)):
        return []
    if resume == "yes":
        return [] if (save / LATEST).exists() else [f"{_NOTHING_TO_RESUME} in --save {save}"]
    other = {*save.iterdir()} - {*leftovers(save), save / LOCK_NAME} if save.is_dir() else set()
    if resume == "auto":
        # All checkpoints were damaged before, and the run ended again before its first one.
        other -= {save / TOKENIZER, *save.glob("damaged-*")}
    if other:
        return [f"--save {save}: {_NOT_EMPTY}"]
    return []


def _next_step(config: TrainingConfig, problems: list[str]) -> str:
    """Return what to do next about problems of settings."""
    if any(each.startswith(_NOTHING_TO_RESUME) for each in problems):
        return "the same command without --resume, or with the --save of a run that has saved a checkpoint"
    if isinstance(config, RunConfig) and config.save and any(each.startswith(NO_SPACE) for each in problems):
        return "free space there, or the same command with another --save, or with a smaller --keep-last"
    if isinstance(config, RunConfig) and config.save and any(each.endswith(_NOT_EMPTY) for each in problems):
        has_run = (config.save / LATEST).exists()
        more = ", or with --resume, which continues the run that is there" if has_run else ""
        return f"the same command with another --save{more}"
    return f"mixtral-run {config.VERB if isinstance(config, RunConfig) else 'pretrain'} --help"


def leftovers(save: Path) -> list[Path]:
    """Return the files of a run that ended before its first checkpoint was complete."""
    return [save / name for name in ALL_FILES if (save / name).exists()] + [*save.glob(PARTIAL)]


def _prompt_errors(config: InferenceConfig) -> list[MixtralRunError]:
    """Return what is wrong with the files of prompts and answers of `generate`."""
    errors: list[MixtralRunError] = []
    if not isinstance(config, GenerateConfig):
        return errors
    if config.prompts is not None:
        try:
            read_prompts(config.prompts)
        except MixtralRunError as error:
            errors.append(error)
    if config.output is not None:
        flag = f"--output {config.output}"
        problems = writing_problems(config.output.parent, flag) + lock_problems(lock_file_of(config.output), flag)
        problems += [f"{flag}: expected a file; found a folder"] if config.output.is_dir() else []
        errors += [ConfigError(SETTINGS_ERROR, problems=problems)] if problems else []
    return errors


def check_inference(config: InferenceConfig, verb: str = "generate") -> None:
    """Check base, layout, adapter, and files of prompts and answers. Raises one error with all problems."""
    errors = _start_errors(config) + _prompt_errors(config)
    problems = file_problems(config.chat_template)
    try:
        base = describe_base(config.load)
        problems += layout_problems(config, base)
        if config.adapter is not None:
            check_adapter_fits(describe_given_adapter(config.adapter, base.architecture), base)
        too_large = inference_memory_error(config, base, processes.process_count(config))
        errors += [too_large] if too_large else []
    except MixtralRunError as error:
        errors.append(error)
    if problems:
        errors.append(ConfigError(SETTINGS_ERROR, problems=problems, next_command=f"mixtral-run {verb} --help"))
    if errors:
        raise joined(errors)
    report_notes(base, Report.on_stderr() if getattr(config, "json", False) else Report())
