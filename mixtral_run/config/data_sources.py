"""Sources of data as the command line names them, with their weights. Standard library only."""

from __future__ import annotations

import difflib
import hashlib
import math
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.config.home_folder import expanded
from mixtral_run.config.names.hub_names import hub_name_and_revision, may_be_hub_name

STANDARD_INPUT = "-"
STDIN_COPY_PREFIX = "mixtral-run-stdin-"
"""Beginning of the name of the file into which standard input is copied."""
_WEIGHT = re.compile(r"(?P<rest>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")
_SPLIT = re.compile(r"(?P<rest>[^:]+)(:(?P<subset>[\w.-]+))?:(?P<split>\w[\w.-]*(\[[^\]]*\])?)")
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class DataSource:
    """One --data-path.

    Attributes:
        text: the source as the command line names it.
        location: a file, a folder, `-`, or OWNER/NAME[@REVISION] on the hub.
        on_hub: True for a name on the hub.
        subset: configuration of a dataset that has several; None takes its only one.
        split: split of a dataset or of a folder; None takes `train`, or the only one.
        weight: relative share of the samples; None if none is given.
    """

    text: str
    location: str
    on_hub: bool = False
    subset: str | None = None
    split: str | None = None
    weight: float | None = None

    @property
    def path(self) -> Path:
        """The file or folder."""
        return expanded(self.location)

    @property
    def name(self) -> str:
        """The source as errors and reports name it."""
        is_copy = not self.on_hub and self.path.name.startswith(STDIN_COPY_PREFIX)
        return "- (standard input)" if is_copy else self.text


def parse_source(text: str) -> DataSource:
    """Return the source that a text names. A path that exists is taken as it is written.

    The forms are `PATH[:WEIGHT]`, `FOLDER:SPLIT[:WEIGHT]` and `OWNER/NAME[@REVISION][:[SUBSET:]SPLIT][:WEIGHT]`.
    """
    if text == STANDARD_INPUT or _exists(text):
        return DataSource(text, text)
    location, weight = text, None
    if found := _WEIGHT.fullmatch(text):
        location, weight = found["rest"], float(found["weight"])
    if location == STANDARD_INPUT or _exists(location):
        return DataSource(text, location, weight=weight)
    subset = split = None
    name = location
    if found := _SPLIT.fullmatch(location):
        name, subset, split = found["rest"], found["subset"], found["split"]
        if subset is None and _is_folder(name):
            return DataSource(text, name, split=split, weight=weight)
    if _may_be_dataset(name):
        return DataSource(text, name, True, subset, split, weight)
    return DataSource(text, location, weight=weight)


def _may_be_dataset(name: str) -> bool:
    """Return True for OWNER/NAME[@REVISION], unless it ends as a file of data does: that is a missing file."""
    return may_be_hub_name(name) and not re.search(
        r"\.(jsonl?|ndjson|csv|tsv|parquet|arrow|feather|gz|zst|bz2|xz|txt|zip)$", hub_name_and_revision(name)[0], re.I
    )


def _exists(text: str) -> bool:
    try:
        return expanded(text).exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _is_file(text: str) -> bool:
    try:
        return expanded(text).is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _is_folder(text: str) -> bool:
    try:
        return expanded(text).is_dir()
    except (OSError, RuntimeError, ValueError):
        return False


def source_problems(flag: str, texts: Sequence[str], *, weights: bool = True) -> list[str]:
    """Return the problems of the sources of one flag. weights: True if the flag's sources may have weights."""
    found = []
    sources = [parse_source(text) for text in texts if text]
    if len(sources) < len(texts):
        found.append(f"{flag}: expected a path; found ''")
    given = [source for source in sources if source.weight is not None]
    if given and not weights:
        found.append(f"{flag} {given[0].text}: expected no weight; every example counts once")
    elif given and len(given) < len(sources):
        without = next(source.text for source in sources if source.weight is None)
        found.append(
            f"{flag}: expected a weight for every source or for none; found none for {without}: write "
            f"{without}:WEIGHT, or leave out :{given[0].text.rpartition(':')[2]}"
        )
    found += [
        f"{flag} {source.text}: expected a weight above 0"
        for source in given
        if not source.weight or math.isinf(source.weight)
    ]
    for source in sources:
        path, _, weight = source.text.rpartition(":")
        if weights and source.weight is None and weight and not _exists(source.text) and _is_file(path):
            found.append(f"{flag} {source.text}: expected a weight above 0, such as {path}:0.5; found {weight!r}")
    if [source.location for source in sources].count(STANDARD_INPUT) > 1:
        found.append(f"{flag}: expected '-', the standard input, once")
    return found


def near_names(path: Path) -> list[str]:
    """Return the paths next to a missing one whose names are like its own, the best first; at most three."""
    try:
        names = [each.name for each in path.parent.iterdir() if not each.name.startswith(".")]
    except OSError:
        return []
    by_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(path.name.lower(), by_case, n=3, cutoff=0.7)
    return [str(path.with_name(by_case[name])) for name in close]


def how_to_find(path: Path) -> str:
    """Return what helps about a path that does not exist: a name that is like it, or a list of its folder."""
    if near := near_names(path):
        return f"the same command with {' or '.join(map(shlex.quote, near))}"
    folder = next((each for each in path.parents if each.is_dir()), path.parent)
    return f"ls {shlex.quote(str(folder))}"


def content_sha256(texts: Sequence[str], sha256: Callable[[Path], str] | None = None) -> str | None:
    """Return a hash of the content of the sources; None if one cannot be read or is on the hub.

    That of one file is its SHA-256; several are the hash of their hashes in order (`combined_sha256`). sha256: returns
    the SHA-256 of a file; by default the file is read.
    """
    of_file = sha256 or _sha256
    found = []
    for source in map(parse_source, texts):
        if source.on_hub:
            return None
        files = sorted(each for each in source.path.rglob("*") if each.is_file()) if source.path.is_dir() else None
        try:
            found += [of_file(each) for each in files or [source.path]]
        except OSError:
            return None
    return combined_sha256(found)


def combined_sha256(sums: Sequence[str]) -> str | None:
    """Return the only one of `sums`, or the hash of all of them in order; None for none."""
    return sums[0] if len(sums) == 1 else hashlib.sha256(" ".join(sums).encode()).hexdigest() if sums else None


def _sha256(path: Path) -> str:
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            whole.update(block)
    return whole.hexdigest()
