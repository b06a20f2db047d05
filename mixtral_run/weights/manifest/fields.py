"""Typed access to the JSON of a manifest. Problems are collected, so that one error can name all of them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, TypeVar

from mixtral_run.config.lora import (
    EXPERT_ADAPTERS,
    LORA_EXPERT_MODULES,
    LORA_INITS,
    LORA_SCALINGS,
    LORA_TARGET_MODULES,
    TRAINED_ALSO,
)
from mixtral_run.model.adapters.lora_settings import LORA_SETTINGS, LoraSettings
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.weights.manifest.template_record import TemplateRecord

T = TypeVar("T")
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u202a-\\u202e\\u2066-\\u2069]")
"""Control characters, among them those that turn the direction of writing."""
_MISSING = object()
_LARGEST = 2**31 - 1
"""The largest size or iteration; products of a few of them are still exact and quick."""
_INTEGER_SIZES = tuple(
    field.name for field in dataclass_fields(MixtralArchitecture) if str(field.type).startswith("int")
)


@dataclass(frozen=True)
class BaseReference:
    """The base of an adapter or of a quantized cache. path: its folder on the machine that wrote the manifest."""

    fingerprint: str
    path: str | None


class Fields:
    """Typed access to a JSON object. Problems are collected, so that one error can name all of them."""

    def __init__(self, values: Mapping[str, Any], problems: list[str], prefix: str = "") -> None:
        self.values = values
        self.problems = problems
        self._prefix = prefix

    def text(self, name: str) -> str:
        """Return a text that has to be there."""
        found = self.values.get(name, _MISSING)
        return found if isinstance(found, str) else self._refuse(name, "a text", found, "")

    def optional_text(self, name: str) -> str | None:
        """Return a text, or None if it is missing or null."""
        found = self.values.get(name)
        return found if found is None or isinstance(found, str) else self._refuse(name, "a text or null", found, None)

    def whole_number(self, name: str, *, at_least: int) -> int:
        """Return an integer from `at_least` to the largest that a size of a model or an iteration may have."""
        found = self.values.get(name, _MISSING)
        if isinstance(found, int) and not isinstance(found, bool) and at_least <= found <= _LARGEST:
            return found
        return self._refuse(name, f"a whole number, {at_least} or more and at most {_LARGEST:,}", found, at_least)

    def positive(self, name: str) -> float:
        """Return a finite number above 0, which has to be there."""
        found: Any = self.values.get(name, _MISSING)
        number = _finite(found)
        return number if number is not None and number > 0 else self._refuse(name, "a number above 0", found, 1.0)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of these texts; the first if it is missing."""
        found = self.values.get(name, choices[0])
        return found if found in choices else self._refuse(name, f"one of {', '.join(choices)}", found, choices[0])

    def dropout(self, name: str) -> float:
        """Return a number from 0 to 0.99, the limits of --lora-dropout; 0 if it is missing."""
        found: Any = self.values.get(name, 0.0)
        number = _finite(found)
        if number is not None and 0 <= number <= 0.99:
            return number
        return self._refuse(name, "a number from 0 to 0.99", found, 0.0)

    def mapping(self, name: str, default: Mapping[str, Any] | None = None) -> Fields:
        """Return the fields of an inner object; without a default it has to be there."""
        found = self.values.get(name, _MISSING if default is None else default)
        if not isinstance(found, Mapping):
            # An empty object would be reported field by field as well: those problems go to a list of their own.
            self._refuse(name, "an object", found, None)
            return Fields({}, [], f"{self._prefix}{name}.")
        return Fields(found, self.problems, f"{self._prefix}{name}.")

    def architecture(self) -> MixtralArchitecture:
        """Return the model's sizes, all of which have to be there."""
        inner = self.mapping("architecture")
        # Only models with a window record it.
        has_window = inner.values.get("sliding_window") is not None
        known = [field.name for field in dataclass_fields(MixtralArchitecture)]
        names = [name for name in known if name != "sliding_window" or has_window]
        sizes: dict[str, Any] = {
            name: inner.whole_number(name, at_least=1) if name in _INTEGER_SIZES else inner.positive(name)
            for name in names
        }
        inner.problems += [f"{inner._prefix}{name[:40]}: unknown" for name in inner.values if name not in names]
        return MixtralArchitecture(**sizes)

    def lora(self) -> LoraSettings:
        """Return an adapter's settings."""
        inner = self.mapping("lora")
        rank, alpha = inner.whole_number("lora_rank", at_least=1), inner.positive("lora_alpha")
        dropout = inner.dropout("lora_dropout")
        targets = inner.values.get("lora_target_modules", _MISSING)
        known = isinstance(targets, list) and targets and all(each in LORA_TARGET_MODULES for each in targets)
        if not known or len(set(targets)) != len(targets):
            expected = f"some of {', '.join(LORA_TARGET_MODULES)}, each once"
            targets = inner._refuse("lora_target_modules", expected, targets, [])
        names = inner.values.keys()
        inner.problems += [f"{inner._prefix}{name[:40]}: unknown" for name in names if name not in LORA_SETTINGS]
        also = inner.values.get("train_also", [])
        if not isinstance(also, list) or any(each not in TRAINED_ALSO for each in also):
            also = inner._refuse("train_also", f"some of {', '.join(TRAINED_ALSO)}", also, [])
        init, shared = inner.choice("init_lora", LORA_INITS), inner.choice("expert_adapters", EXPERT_ADAPTERS)
        if init != LORA_INITS[0] and shared != EXPERT_ADAPTERS[0] and set(targets) & set(LORA_EXPERT_MODULES):
            shared = inner._refuse("expert_adapters", f"each with init_lora {init}", shared, EXPERT_ADAPTERS[0])
        return LoraSettings(
            rank,
            alpha,
            dropout,
            tuple(targets),
            scaling=inner.choice("lora_scaling", LORA_SCALINGS),
            init=init,
            train_also=tuple(each for each in TRAINED_ALSO if each in also),
            shared=shared == EXPERT_ADAPTERS[1],
            expert_rank=inner.whole_number("lora_rank_experts", at_least=1) if "lora_rank_experts" in names else None,
            expert_alpha=inner.positive("lora_alpha_experts") if "lora_alpha_experts" in names else None,
        )

    def base(self) -> BaseReference:
        """Return the reference to the base."""
        inner = self.mapping("base")
        return BaseReference(inner.text("fingerprint"), inner.optional_text("path"))

    def chat_template(self) -> TemplateRecord | None:
        """Return the chat template of an adapter; None if it is missing or null."""
        found = self.values.get("chat_template")
        if found is None:
            return None
        record = TemplateRecord.parse(found)
        if record is None or _CONTROL.search(record.name):
            return self._refuse("chat_template", "a template's name and texts, with their fingerprint", found, None)
        return record

    def checksums(self) -> dict[str, int]:
        """Return all fields of this object as CRC-32, which are stored as hexadecimal text."""
        found = {}
        for name, text in self.values.items():
            try:
                found[name] = int(text, 16)
            except (TypeError, ValueError):
                self._refuse(name, "a CRC-32 in hexadecimal", text, None)
        return found

    def _refuse(self, name: str, expected: str, found: object, stand_in: T) -> T:
        self.problems.append(f"{self._prefix}{name}: expected {expected}; found {shown(found)}")
        return stand_in


def _finite(value: object) -> float | None:
    """Return a finite number of JSON as a float, None for anything else."""
    if type(value) not in (int, float):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) else None


def unprintable(values: Mapping[str, Any]) -> str | None:
    """Return the top-level field, quoted, in which a key or text could move a terminal's cursor; None if none could.

    Line breaks and tabs are only left to the settings of a training run. A chat template, which comes from a model, may
    hold anything: it is never printed.
    """
    for name, value in values.items():
        if name == "chat_template":
            continue
        left_alone = "\n\t" if name == "training" else ""
        waiting: list[Any] = [name, value]
        while waiting:
            each = waiting.pop()
            if isinstance(each, Mapping):
                waiting += [*each.keys(), *each.values()]
            elif isinstance(each, list):
                waiting += each
            elif isinstance(each, str) and not set(_CONTROL.findall(each)) <= set(left_alone):
                return ascii(name[:40])
    return None


def shown(value: object) -> str:
    """Return a short text of a value for a message."""
    if value is _MISSING or value is None:
        return "nothing"
    if isinstance(value, (Mapping, list)):
        return "an object" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
