"""Answers: what `generate` prints and writes, and the JSONL file that a second run continues."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError
from mixtral_run.inference.continuation import Sampling
from mixtral_run.inference.session import Session

SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Answer:
    """A prompt and the generated text. finished: generation ended with a token that ends a turn."""

    prompt: str
    text: str
    num_tokens: int
    finished: bool


class AnswersFile:
    """A JSONL file with a line for each answer, in the order of the prompts. One process of a job opens it.

    Each line has two short hashes: of the model and the settings, and of the prompt's tokens. From them a later run
    tells whether the answers that are there are those that it would give.

    Args:
        file: may exist. A line that is cut off at its end, by a kill or a full disk, is removed.
        rows: token ids of all prompts.
        run: hash of everything else that decides the answers (`run_hash`).

    Raises:
        ConfigError: the file holds something else than the first answers of this run.
    """

    def __init__(self, file: Path, rows: Sequence[Sequence[int]], run: str) -> None:
        self._file, self._run = file, run
        self._rows = [_hash(list(row)) for row in rows]
        whole, size = _whole_lines(file)
        self.num_done = self._check(whole)
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("ab")
        self._stream.truncate(size)

    def write(self, number: int, answer: Answer) -> None:
        """Append the answer to the prompt `number`."""
        line = {"index": number, **asdict(answer), "run": self._run, "row": self._rows[number]}
        self._stream.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def _check(self, lines: Sequence[bytes]) -> int:
        """Return the number of answers that are there."""
        problems = []
        if len(lines) > len(self._rows):
            problems.append(f"expected at most {len(self._rows):,} lines, one for each prompt; found {len(lines):,}")
        for number, (line, row) in enumerate(zip(lines, self._rows, strict=False)):
            found = _object(line)
            if found.get("index") != number or "run" not in found:
                problems.append(f"line {number + 1}: expected the answer of prompt {number + 1}; found something else")
            elif found["run"] != self._run:
                problems.append(f"line {number + 1}: the answer of another model, adapter, template or other sampling")
            elif found.get("row") != row:
                problems.append(f"line {number + 1}: the answer of another prompt")
            if problems:
                break
        if problems:
            raise ConfigError(
                "The file of answers does not belong to this run.",
                where=f"--output {self._file}",
                problems=problems,
                expected="a new file, or the first answers of the same prompts with the same model and settings",
                next_command="the same command with another --output, or with the settings of the first run",
            )
        return len(lines)


def run_hash(session: Session, sampling: Sampling, dtype: str, base_precision: str = "bf16") -> str:
    """Return a short hash of the model, the chat template and the settings that decide the answers."""
    adapter = session.adapter
    # Of an HF directory only the first half of its fingerprint, without the weights, is known before they are loaded.
    parts: list[Any] = [session.base.fingerprint.split("-")[0], session.template.fingerprint, asdict(sampling), dtype]
    if session.base.weights is not None:
        parts.append({each.name: _sample(each) for each in session.base.weights.files})
    if adapter is not None:
        files = dict(adapter.files) or {
            each.name: each.stat().st_size for each in adapter.folder.iterdir() if each.is_file()
        }
        parts += [adapter.iteration, sorted(files.items())]
    if base_precision != "bf16":
        parts.append(base_precision)
    return _hash(parts)


def _sample(file: Path) -> tuple[int, int]:
    """Return a file's size and the CRC-32 of bytes in its middle: other weights of the same form differ there."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(size // 2 - SAMPLE_BYTES // 2, 0))
        return size, zlib.crc32(stream.read(SAMPLE_BYTES))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _whole_lines(file: Path) -> tuple[list[bytes], int]:
    """Return the complete lines of a file, and their size in bytes. There are none if there is no file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return [], 0
    size = content.rfind(b"\n") + 1
    return content[:size].splitlines(), size


def _object(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
