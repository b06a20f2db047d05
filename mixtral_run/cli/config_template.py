"""The commented YAML file that `mixtral-run config init VERB` writes: every setting of a verb, with its default."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from mixtral_run.cli.command import SECTIONS
from mixtral_run.config.fields import Config
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.evaluate import EvaluateConfig
from mixtral_run.config.verbs.generate import ChatConfig, GenerateConfig
from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.serve import ServeConfig
from mixtral_run.config.verbs.training import FinetuneConfig, UpConfig
from mixtral_run.config.verbs.trial import RehearseConfig, SmokeConfig
from mixtral_run.config.verbs.weights import ConvertConfig, ExportConfig, VerifyConfig

CONFIGS: dict[str, type[Config]] = {
    "up": UpConfig, "convert": ConvertConfig, "verify": VerifyConfig, "plan": PlanConfig, "finetune": FinetuneConfig,
    "align": AlignConfig, "pretrain": PretrainConfig, "generate": GenerateConfig, "chat": ChatConfig,
    "evaluate": EvaluateConfig, "serve": ServeConfig, "export": ExportConfig,
    "smoke": SmokeConfig, "rehearse": RehearseConfig,
}  # fmt: skip
"""Verbs that take --config, with their settings."""
_ALTERNATIVE = {
    "convert": "hf_model_path", "finetune": "data_path", "align": "data_path", "pretrain": "data_path",
    "up": "data_path", "generate": "prompt", "evaluate": "data_path",
}  # fmt: skip
"""The setting that the template fills in where a verb needs one of several."""
_WIDTH = 110


def config_template(verb: str) -> str:
    """Return the file for a verb. Required settings stand in it without a value, all others commented out."""
    arguments = " USER@HOST" if verb == "up" else ""
    lines = [
        f"# Settings of: mixtral-run {verb}{arguments} --config FILE",
        "# Settings that are commented out show their default. Flags on the command line take precedence.",
    ]
    fields = [item for item in dataclasses.fields(CONFIGS[verb]) if not item.metadata["hidden"]]
    for section in sorted({item.metadata["section"] for item in fields}, key=SECTIONS.index):
        lines += ["", f"# {section}", "# " + "-" * len(section)]
        for item in fields:
            if item.metadata["section"] == section:
                lines += ["", *_setting(item)]
    return "\n".join(lines) + "\n"


def required_settings(verb: str) -> list[str]:
    """Return the settings of a verb that its file leaves open and that must be given; of alternatives the usual one."""
    fields = dataclasses.fields(CONFIGS[verb])
    return [item.name for item in fields if item.default is MISSING or item.name == _ALTERNATIVE.get(verb)]


def _setting(item: dataclasses.Field[Any]) -> list[str]:
    is_required = item.default is MISSING
    text = item.metadata["help"] + ("  Required." if is_required else "")
    if item.metadata["choices"]:
        text += f"  One of: {', '.join(item.metadata['choices'])}."
    comment = textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    return [*comment, f"{item.name}:" if is_required else f"# {item.name}: {_yaml_value(item.default)}"]


def _yaml_value(value: Any) -> str:
    """Return a default as YAML that means the same to every version of it: texts in quotes, floats with a point."""
    if isinstance(value, float):
        text = repr(value)
        digits, letter, exponent = text.partition("e")
        return text if "." in digits or not letter else f"{digits}.0e{exponent}"
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
