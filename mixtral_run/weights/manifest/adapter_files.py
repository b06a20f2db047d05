"""Checksums of the files of an adapter: written into its manifest, and compared before an adapter is used.

CRC-32 finds every flipped bit and every damaged block; it is no protection against a person who means to deceive.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mixtral_run.errors import WeightsError, shortened
from mixtral_run.terminal.report import Report
from mixtral_run.weights.io.crc import crc_of
from mixtral_run.weights.manifest.checkpoint_folder import LATEST, Checkpoint, files_manifest_of, iteration_of
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME

TOKENIZER = "tokenizer"
"""Folder next to the iterations with the tokenizer of the base."""
NEXT_MARKER = f".{LATEST}.next"
"""The marker of an iteration that is about to get its name; what is left of it shows a save that was cut off."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]{0,199}")


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the CRC-32 of files in a folder, as hexadecimal digits by name."""
    return {name: f"{crc_of(folder / name):08x}" for name in sorted(names)}


def check_adapter(checkpoint: Checkpoint, report: Report) -> None:
    """Raise WeightsError naming each file of an adapter's iteration that is not what was written. One process calls.

    An adapter of an earlier version of the kit has no checksums, which is reported.
    """
    manifest = files_manifest_of(checkpoint)
    report_without_checksums(manifest.files, checkpoint.iteration_folder, report)
    names = list(manifest.files)
    with ThreadPoolExecutor(2, "checksum") as pool:
        found = pool.map(lambda name: file_problems(checkpoint.iteration_folder, manifest.files, [name]), names)
        problems = [problem for each in found for problem in each]
    problems += tokenizer_file_problems(checkpoint)
    problems += marker_problems(checkpoint.folder, checkpoint.iteration_folder)
    raise_if_damaged(checkpoint.iteration_folder, problems)


def report_without_checksums(files: Mapping[str, int], folder: Path, report: Report) -> None:
    """Report an adapter that has no checksums. files: those of its manifest."""
    if not files:
        report.say(f"  {folder} has no checksums: an earlier version of mixtral-run wrote it; damage cannot be seen")


def file_problems(folder: Path, written: Mapping[str, int], names: Iterable[str]) -> list[str]:
    """Return a line for each of the named files that differs from what was written."""
    problems = []
    for name in names:
        if not _FILE_NAME.fullmatch(name):
            problems.append(f"{name[:40]!a}: not the name of a file of a checkpoint")
            continue
        try:
            found = crc_of(folder / name)
        except OSError as error:
            problems.append(f"{name}: {error.strerror}")
            continue
        if found != written[name]:
            problems.append(f"{name}: expected CRC-32 {written[name]:08x}; found {found:08x}")
    return problems


def tokenizer_file_problems(checkpoint: Checkpoint) -> list[str]:
    """Return a line for each file of the adapter's tokenizer that is not what was written.

    An iteration may be copied without the folder, and --resume writes the folder again.
    """
    if not (checkpoint.folder / TOKENIZER).is_dir():
        return []
    written = files_manifest_of(checkpoint).tokenizer_files
    problems = file_problems(checkpoint.folder / TOKENIZER, written, written)
    return [f"{TOKENIZER}/{problem}" for problem in problems]


def marker_problems(folder: Path, used: Path) -> list[str]:
    """Return a line if the marker names an older iteration than the newest one, without a save that was cut off.

    used: the iteration's folder that is used; another one than the marker names was chosen on purpose.
    """
    if not (folder / LATEST).is_file():
        return []
    text = (folder / LATEST).read_text(encoding="utf-8", errors="replace")
    named = iteration_of(used)
    if text.strip() != str(named):
        return []
    if text not in (f"{named}\n", str(named)):
        return [f"{LATEST}: expected {named} and a line break; found {text[:40]!a}"]
    newer = [each for each in folder.glob("iter_*") if iteration_of(each) > named and (each / MANIFEST_NAME).is_file()]
    if not newer or (folder / NEXT_MARKER).exists():
        return []
    last = max(newer, key=iteration_of)
    return [
        f"{LATEST}: names iteration {named}, but {last.name} is newer: echo {iteration_of(last)} > "
        f"{shlex.quote(str(folder / LATEST))} "
        f"uses that one, rm -r {shlex.quote(str(last))} goes back to {named}"
    ]


def raise_if_damaged(folder: Path, problems: list[str]) -> None:
    """Raise WeightsError with the problems of an adapter's files, if there are any."""
    if problems:
        raise WeightsError(
            "The checkpoint's files are not what was written.",
            where=str(folder),
            problems=shortened(problems),
            next_command=f"copy them again from where the checkpoint was made; other iterations: {_others(folder)}",
        )


def _others(folder: Path) -> str:
    """Return the other iterations next to a damaged one, as text."""
    names = sorted(each.name for each in folder.parent.glob("iter_*") if each != folder and each.is_dir())
    return ", ".join(names[-3:]) or "there is none"
