"""List of the runs in folders. Standard library of Python 3.8 only: `runs --on` sends this file to hosts.

A folder that is odd or damaged costs its own row and never the list.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any

from mixtral_run.results.read_run import RunData, curve, loss_summary, mapping, number, read_run

MARKS = ("run.json", "metrics.jsonl", "summary.json", "latest_checkpointed_iteration.txt")
"""A folder with one of these files may be a run."""
LOCK_NAME = ".mixtral-run.lock"
DEEPEST, MOST_FOLDERS, MOST_RUNS = 4, 20000, 1000
"""Folders below a folder are searched so deep; so many are looked at, and so many runs are listed."""


def find_runs(folders: list[str]) -> dict[str, Any]:
    """Return {"runs": a row for each run, the newest first; "problems": a line for each folder without any}."""
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for folder in folders:
        found = _run_folders(folder, problems)
        for each in found:
            if each not in seen and len(rows) < MOST_RUNS:
                seen.add(each)
                row = row_of(Path(each))
                rows += [row] if row else []
    rows.sort(key=lambda row: (row["started"] or "", row["folder"]), reverse=True)
    return {"runs": rows, "problems": problems}


def _run_folders(folder: str, problems: list[str]) -> list[str]:
    """Return the folders that look like runs: the folder itself, or those below it."""
    top = os.path.realpath(folder)
    if not Path(top).is_dir():
        problems.append(f"{folder}: no folder")
        return []
    found: list[str] = []
    for num_seen, (path, names, files) in enumerate(os.walk(top)):
        if num_seen == MOST_FOLDERS:
            problems.append(f"{folder}: only {MOST_FOLDERS:,} of its folders were looked at")
            break
        depth = len(Path(path).relative_to(top).parts)
        if any(mark in files for mark in MARKS):
            found.append(path)
            names.clear()
        elif depth >= DEEPEST:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith(".") and not name.startswith("iter_"))
    return found


def row_of(folder: Path) -> dict[str, Any] | None:
    """Return the row of a run as JSON values; None for a checkpoint that no training run wrote. Never raises."""
    data = read_run(folder)
    if not data.is_run:
        return None
    run = data.summary or data.run
    settings, kit = mapping(run.get("settings")), mapping(run.get("kit"))
    losses = loss_summary(data) or {}
    validation = curve(data.validation, "loss")
    best = min(validation, key=lambda point: point[1]) if validation else (None, None)
    started = _text(run.get("started"))
    total = number(data.summary.get("train_iters") or settings.get("train_iters"))
    done = curve(data.metrics, "loss")
    return {
        "folder": str(folder),
        "name": _text(run.get("name")) or folder.name,
        "state": _state(data),
        "started": started or _modified(folder),
        "iteration": done[-1][0] if done else 0,
        "train_iters": None if total is None else int(total),
        "first_loss": losses.get("first_loss"),
        "last_loss": losses.get("last_loss"),
        "best_iteration": best[0],
        "best_validation_loss": best[1],
        "tokens_per_second": number(data.summary.get("tokens_per_second")),
        "data_sha256": _text(mapping(run.get("data")).get("sha256")),
        "kit": _text(kit.get("commit")) or _text(kit.get("version")),
        "settings": settings,
        "former_settings": run.get("former_settings") or [],
        "problems": data.problems[:10],
    }


def _state(data: RunData) -> str:
    """Return complete, stopped, stopped early, running, ended (without a summary) or damaged."""
    if _is_held(data.folder / LOCK_NAME):
        return "running"
    summary = data.summary
    last, of = number(summary.get("last_iteration")), number(summary.get("train_iters"))
    newest = data.metrics[-1]["iteration"] if data.metrics else 0
    if last is not None and last >= newest:
        if summary.get("stopped_early") is True:
            return "stopped early"
        return "complete" if of is not None and last >= of else "stopped"
    return "damaged" if data.problems else "ended"


def _is_held(lock: Path) -> bool:
    try:
        descriptor = os.open(str(lock), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _modified(folder: Path) -> str | None:
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(folder.stat().st_mtime))
    except (OSError, ValueError, OverflowError):
        return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) < 300 and value.isprintable() else None
