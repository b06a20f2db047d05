"""Rows of runs for people: a table, the best run, and what differs between two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixtral_run.config.former_settings import FORMER_SETTINGS, from_values, with_former
from mixtral_run.config.verbs.align import loss_of
from mixtral_run.errors import ConfigError
from mixtral_run.results.read_run import number

COLUMNS = ("run", "state", "started (UTC)", "iteration", "loss", "best validation loss", "tokens/s", "folder")
NARROW_COLUMNS = ("run", "state", "iteration", "loss", "validation")
_FIGURES = ("state", "iteration", "first_loss", "last_loss", "best_validation_loss", "best_iteration",
            "tokens_per_second", "data_sha256", "kit")  # fmt: skip
OF_THE_PLACE = ("save", "run_name", "resume")
"""Settings that differ between any two runs."""


def printable(text: object) -> str:
    """Return a text without characters that change a terminal: the files of runs are not trusted."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of COLUMNS."""
    of = f" of {row['train_iters']:,}" if row.get("train_iters") else ""
    loss = f"{_number(row.get('first_loss'))} → {_number(row.get('last_loss'))}" if row.get("last_loss") else ""
    best = (
        f"{_number(row['best_validation_loss'])} at {row['best_iteration']:,}"
        if row.get("best_iteration") is not None
        else ""
    )
    state = str(row.get("state")) + (" !" if row.get("problems") else "")
    started = str(row.get("started") or "").replace("T", " ").rstrip("Z")
    rate = number(row.get("tokens_per_second"))
    found = (row.get("name"), state, started, f"{row.get('iteration', 0):,}{of}", loss, best)
    return (*map(printable, found), "" if rate is None else f"{rate:,.0f}", printable(row.get("folder")))


def narrow_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the cells of NARROW_COLUMNS."""
    name, state, _, iteration, _, _, _, _ = cells(row)
    return name, state, iteration, _number(row.get("last_loss")), _number(row.get("best_validation_loss"))


def best_run(rows: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], list[str]]:
    """Return the run with the lowest validation loss, and remarks. Without validation sets the last loss decides.

    Raises ConfigError if no run has a loss.
    """
    remarks = []
    name = "best_validation_loss"
    known = [row for row in rows if number(row.get(name)) is not None]
    if not known:
        name = "last_loss"
        known = [row for row in rows if number(row.get(name)) is not None]
        remarks.append("No run has a validation set: the loss of the last iteration decides.")
    elif len(known) < len(rows):
        remarks.append(f"{len(rows) - len(known)} of {len(rows)} runs have no validation loss and do not take part.")
    if not known:
        raise ConfigError("No run has a loss.", expected="folders that finetune, align or pretrain wrote with --save")
    if len({repr(loss_of(row.get("settings") or {})) for row in known}) > 1:
        remarks.append("The runs do not minimize the same loss: their losses cannot be compared.")
    data = {_validation_data(row) for row in known}
    if name == "best_validation_loss" and len(data) > 1:
        remarks.append("The runs do not have the same validation set: their losses cannot be compared.")
    return min(known, key=lambda row: (row[name], str(row.get("folder")))), remarks


def best_checkpoint(row: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the checkpoint of the best evaluation if it is there, else the folder of the run and a remark."""
    folder = Path(str(row["folder"]))
    best = row.get("best_iteration")
    checkpoint = folder / f"iter_{best or 0:07d}"
    if best and checkpoint.is_dir():
        return str(checkpoint), None
    if not best or best == row.get("iteration"):
        return str(folder), None
    return str(folder), f"Iteration {best:,} has no checkpoint (--save-interval): the newest checkpoint is exported."


def words_for_best(row: Mapping[str, Any]) -> str:
    """Return the verb and the flag that take the checkpoint of a run: an adapter, or a model of full fine-tuning."""
    return "convert --from-megatron" if "offload_optimizer" in (row.get("settings") or {}) else "export --adapter"


def _validation_data(row: Mapping[str, Any]) -> str:
    settings = row.get("settings") or {}
    if settings.get("valid_fraction"):
        return repr((settings["valid_fraction"], row.get("data_sha256")))
    return repr(settings.get("valid_data_path"))


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (name, value, value) of each figure and of each setting that differs between two runs.

    A setting that --resume changed has its values before as well.
    """
    found = [(name.replace("_", " "), _shown(first.get(name)), _shown(second.get(name))) for name in _FIGURES]
    settings = [row.get("settings") or {} for row in (first, second)]
    former = [from_values(row.get(FORMER_SETTINGS)) for row in (first, second)]
    for name in sorted({*settings[0], *settings[1]} - set(OF_THE_PLACE)):
        one, two = (
            printable(with_former(name, _shown(each.get(name)), before))
            for each, before in zip(settings, former, strict=True)
        )
        found.append((f"--{name.replace('_', '-')}", one, two))
    return [(printable(name), a, b) for name, a, b in found if a != b]


def _number(value: Any) -> str:
    found = number(value)
    return "" if found is None else f"{found:.4g}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        "–"
        if value is None or value == []
        else printable(", ".join(map(str, value)) if isinstance(value, list) else value)
    )
