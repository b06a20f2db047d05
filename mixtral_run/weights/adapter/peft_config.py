"""What the kit does with each field of a PEFT adapter's adapter_config.json. Standard library only."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixtral_run.errors import WeightsError

CONFIG_NAME = "adapter_config.json"

_HARMLESS = frozenset(
    {
        # Names and notes; the tensors say which modules and layers have an adapter.
        *("auto_mapping", "base_model_name_or_path", "revision", "peft_version", "target_modules", "target_parameters"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
        # How PEFT runs or trains the adapter, not what it computes once it is trained.
        *("inference_mode", "lora_dropout", "megatron_core", "runtime_config", "loftq_config", "eva_config"),
        *("qalora_group_size", "ensure_weight_tying"),
    }
)
_USED = frozenset({"peft_type", "task_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"})
_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "true", "false")
"""Values of init_lora_weights that leave the base's weights as they are."""


def is_peft_directory(folder: Path) -> bool:
    """Return True if a folder looks like what PEFT's save_pretrained writes."""
    return (folder / CONFIG_NAME).is_file()


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read FOLDER/adapter_config.json. Raises WeightsError if it is no JSON object."""
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError("The PEFT adapter cannot be read.", where=str(path), found=error.strerror) from error
    except (ValueError, RecursionError) as error:
        raise WeightsError("The PEFT adapter's config is not valid JSON.", where=str(path), found=str(error)) from error
    if not isinstance(values, dict):
        raise WeightsError("The PEFT adapter's config is not a JSON object.", where=str(path))
    return values


def peft_config_problems(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each setting that a Megatron adapter of this kit cannot represent."""
    problems = []
    if values.get("peft_type") != "LORA":
        problems.append(f"peft_type: expected 'LORA'; found {values.get('peft_type')!r}")
    if values.get("task_type") not in (None, "CAUSAL_LM"):
        problems.append(f"task_type: expected 'CAUSAL_LM'; found {values['task_type']!r}")
    if values.get("bias", "none") != "none":
        problems.append(f"bias: expected 'none', since a Mixtral has no biases; found {values['bias']!r}")
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        if not _is_positive(values.get(name)) or not isinstance(values[name], kinds):
            problems.append(f"{name}: expected a number above 0; found {values.get(name)!r}")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = values.get(name) or {}
        if not isinstance(pattern, Mapping) or not all(_is_positive(each) for each in pattern.values()):
            problems.append(f"{name}: expected numbers above 0 by names of modules; found {str(pattern)[:60]}")
        else:
            problems += [
                f"{name}: expected names, or regular expressions without a repeated group; found {str(key)[:60]!r}"
                for key in pattern
                if not _is_pattern(str(key))
            ]
    initialization = values.get("init_lora_weights")
    if initialization not in _INITIALIZATIONS:
        problems.append(
            f"init_lora_weights: {initialization!r} also changes the base's weights; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )
    known = {*_HARMLESS, *_USED, "init_lora_weights"}
    problems += [
        f"{name}: expected nothing, since only plain LoRA can be represented; found {str(value)[:60]}"
        for name, value in values.items()
        if name not in known and value not in (None, False, 0, "", [], {})
    ]
    return problems


def scale_of(values: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor of B·A of a module, by its name in the model, as PEFT scales it."""
    alpha = values["lora_alpha"]
    for key, value in (values.get("alpha_pattern") or {}).items():
        # As PEFT matches names: the whole name, or its end after a dot.
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def version_of(values: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Return major and minor of the PEFT that wrote the adapter, None if it does not say."""
    found = re.match(r"(\d+)\.(\d+)", str(values.get("peft_version") or ""))
    return (int(found[1]), int(found[2])) if found else None


def _is_pattern(text: str) -> bool:
    """Return True for a regular expression that is valid, and that no name of a module takes forever to match."""
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return re.search(r"\)\s*[*+{]", text) is None


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
