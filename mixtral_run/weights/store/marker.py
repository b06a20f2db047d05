"""The marker of a folder in a store: its files with sizes and checksums. It is written last and removed first.

Anybody may have written it: its values are checked before they are used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath

from mixtral_run.errors import WeightsError

MARKER = "mixtral_run_complete.json"
_VERSION = 1
_LARGEST = 2**50
_MOST_FILES = 100_000


@dataclass(frozen=True)
class FileRecord:
    """Size and CRC-32 of a file, the latter as 8 hexadecimal digits."""

    size: int
    crc32: str


@dataclass(frozen=True)
class Marker:
    """A complete folder. validation_loss: that of a run's iteration, for --keep-best."""

    files: Mapping[str, FileRecord]
    validation_loss: float | None = None

    def to_bytes(self) -> bytes:
        """Return the marker as the text of a JSON object."""
        files = {name: asdict(record) for name, record in sorted(self.files.items())}
        values = {"version": _VERSION, "validation_loss": self.validation_loss, "files": files}
        return json.dumps(values, indent=1).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, where: str) -> Marker:
        """Return the marker that `to_bytes` wrote. Raises WeightsError for anything else."""
        try:
            values = json.loads(content)
            loss = values["validation_loss"]
            files = {name: FileRecord(each["size"], each["crc32"]) for name, each in values["files"].items()}
            is_right = values["version"] == _VERSION and len(files) <= _MOST_FILES and all(map(is_safe_name, files))
            is_right &= loss is None or (type(loss) in (int, float) and math.isfinite(loss))
            if is_right and all(_is_record(each) for each in files.values()):
                return cls(files, loss)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            pass
        raise WeightsError(
            "The marker of a folder in a store is damaged.",
            where=where,
            expected="names, sizes and checksums of files, as mixtral-run writes them",
            next_command="the command that wrote the folder, once more",
        )


def is_safe_name(name: str) -> bool:
    """Return True for a relative path that leads nowhere else, in its shortest form."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and str(path) == name
        and not path.is_absolute()
        and ".." not in path.parts
        and name.isprintable()
        and len(name) < 500
        and "\\" not in name
    )


def _is_record(record: FileRecord) -> bool:
    return (
        type(record.size) is int
        and 0 <= record.size < _LARGEST
        and isinstance(record.crc32, str)
        and re.fullmatch(r"[0-9a-f]{8}", record.crc32) is not None
    )
