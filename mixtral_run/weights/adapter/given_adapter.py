"""Describe an adapter that a verb was given: a checkpoint that finetune saved, or a directory that PEFT saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.adapter.peft_config import (
    CONFIG_NAME,
    is_peft_directory,
    peft_config_problems,
    read_peft_config,
)
from mixtral_run.weights.adapter.peft_factors import PeftFactors
from mixtral_run.weights.hf.pytorch_bin import read_bin_files
from mixtral_run.weights.hf.safetensors_files import TensorEntry, read_header
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import AdapterDescription, describe_adapter
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME, UNKNOWN_FINGERPRINT, ExportManifest, read_manifest
from mixtral_run.weights.manifest.template_record import TemplateRecord

SAFETENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"


@dataclass(frozen=True)
class PeftDescription(AdapterDescription):
    """An adapter that PEFT saved. Its base is not recorded; `base_name` is what its config says."""

    factors: PeftFactors
    base_name: str | None


def describe_given_adapter(folder: Path, architecture: MixtralArchitecture) -> AdapterDescription:
    """Describe the adapter in FOLDER, which belongs to a model of these sizes.

    Raises WeightsError with all problems: of a directory of PEFT everything that the kit cannot represent.
    """
    if (folder / LATEST).exists() or not is_peft_directory(folder):
        return describe_adapter(folder)
    config = read_peft_config(folder)
    problems = [f"{CONFIG_NAME}: {problem}" for problem in peft_config_problems(config)]
    if problems:
        raise _unusable(folder, problems)
    factors = PeftFactors(architecture, _entries(folder), config)
    if factors.problems:
        raise _unusable(folder, factors.problems)
    factors.settle_rank()
    lora = LoraSettings(factors.rank, factors.scale * factors.rank, 0.0, factors.target_modules)
    name = config.get("base_model_name_or_path")
    return PeftDescription(
        folder, 0, lora, UNKNOWN_FINGERPRINT, {}, None, factors, name if isinstance(name, str) else None,
        chat_template=_chat_template(folder),
    )  # fmt: skip


def _chat_template(folder: Path) -> TemplateRecord | None:
    """Return the template that `export` recorded, else that of the tokenizer in a directory of PEFT.

    None if there is neither. Raises WeightsError if it cannot be read.
    """
    if (folder / MANIFEST_NAME).is_file():
        recorded = read_manifest(folder, ExportManifest).chat_template
        if recorded is not None:
            return recorded
    try:
        return TemplateRecord.read(folder)
    except (OSError, ValueError) as error:
        raise _unusable(folder, [f"its chat template cannot be read: {error}"]) from error


def _entries(folder: Path) -> dict[str, TensorEntry]:
    if (folder / SAFETENSORS).is_file():
        return {entry.name: entry for entry in read_header(folder / SAFETENSORS)}
    if not (folder / BIN).is_file():
        raise _unusable(folder, [f"neither {SAFETENSORS} nor {BIN} is there"])
    headers = read_bin_files(folder, [BIN])
    if headers.problems:
        raise _unusable(folder, list(headers.problems))
    return dict(headers.entries)


def _unusable(folder: Path, problems: list[str]) -> WeightsError:
    return WeightsError(
        "The PEFT adapter cannot be used with this model.",
        where=str(folder),
        problems=shortened(problems),
        next_command="merge it into its base with PEFT (merge_and_unload, save_pretrained); give the result as --load",
    )
