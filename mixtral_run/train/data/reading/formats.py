"""Recognition of a file's format by its content, and opening of compressed files.

Standard library only, but for Zstandard, which pyarrow reads.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mixtral_run.config.data import FIELDS
from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.json_values import JsonReader

HEAD_BYTES = 1 << 16
"""Bytes from the beginning of a file that decide its format."""

JSONL, JSON, CSV, PARQUET, ARROW_FILE, ARROW_STREAM = "JSONL", "JSON", "CSV", "Parquet", "Arrow file", "Arrow stream"

_ENCODINGS = (
    # UTF-32 first: its mark for little endian begins with that of UTF-16.
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8-sig"),
)
_TABLES = ((b"PAR1", PARQUET), (b"ARROW1", ARROW_FILE), (b"\xff\xff\xff\xff", ARROW_STREAM))
_REFUSED = (
    (b"PK\x03\x04", "a zip archive", "unzip {path}, then the unpacked files"),
    (b"\x93NUMPY", "an array of NumPy", "a file of JSONL, CSV or Parquet"),
    (b"\x89PNG", "a picture", "a file of JSONL, CSV or Parquet"),
    (b"GGUF", "weights of a model (GGUF)", "the data to learn from: JSONL, CSV or Parquet"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x {path}, then the unpacked files"),
    (b"SQLite format 3\x00", "an SQLite database", "sqlite3 -json {path} 'SELECT …' > {path}.json"),
    (b"\x89HDF", "an HDF5 file", "a file of JSONL, CSV or Parquet"),
    (b"%PDF", "a PDF file", "a file of JSONL, CSV or Parquet"),
    (b"Obj\x01", "an Avro file", "a file of JSONL, CSV or Parquet"),
    (b"ORC", "an ORC file", "a file of JSONL, CSV or Parquet"),
    (b"\x80\x02", "a pickle, which is never loaded", "a file of JSONL, CSV or Parquet"),
    (b"\x80\x04", "a pickle, which is never loaded", "a file of JSONL, CSV or Parquet"),
    (b"\x80\x05", "a pickle, which is never loaded", "a file of JSONL, CSV or Parquet"),
    (b"version https://git-lfs", "a pointer of Git LFS, without the data", "git lfs pull, in its repository"),
    (b"<!DOCTYPE", "a page of HTML", "download the file itself again, for example its 'raw' form"),
    (b"<html", "a page of HTML", "download the file itself again, for example its 'raw' form"),
)


_ZIPS = (
    (b"data.pkl", "a checkpoint of PyTorch, which is never loaded", "a file of JSONL, CSV or Parquet"),
    (b"[Content_Types].xml", "a document of Excel or Word", "Excel saves CSV: save the sheet as CSV UTF-8"),
    (b".npy", "an archive of arrays of NumPy", "a file of JSONL, CSV or Parquet"),
)
"""What the first names within a zip archive say about it."""


@dataclass(frozen=True, slots=True)
class Format:
    """What a file holds.

    Attributes:
        name: one of the formats above; None for an empty file.
        encoding: of the text.
        delimiter: of CSV.
        compression: gzip, bzip2, xz or Zstandard; None if the file is not compressed.
    """

    name: str | None
    encoding: str = "utf-8"
    delimiter: str = ","
    compression: str | None = None


def format_of(path: Path, where: str) -> Format:
    """Return the format of a file. Raises ConfigError if it is none that is read, with the command that helps."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    compression = next((name for start, name in _COMPRESSED if head.startswith(start)), None)
    if compression is None:
        return _format_of_head(head, path, where)
    with open_bytes(path, compression, where) as stream:
        found = _format_of_head(_read_head(stream), path, where)
    if found.name in (PARQUET, ARROW_FILE):
        raise ConfigError(
            f"A {found.name} file is read at any place, which one compressed with {compression} does not allow.",
            where=where,
            next_command=f"{_UNPACK[compression]} {path}, then the unpacked file",
        )
    return Format(found.name, found.encoding, found.delimiter, compression)


@contextmanager
def open_bytes(path: Path, compression: str | None, where: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressed. Errors of the file while it is read become ConfigError."""
    try:
        with _OPENERS[compression](path) as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise _damaged(compression, where, error) from error
    except OSError as error:
        if error.errno is None and compression is not None:
            raise _damaged(compression, where, error) from error
        raise ConfigError("The data cannot be read.", where=where, found=error.strerror or str(error)) from error


def _damaged(compression: str | None, where: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"The data are compressed with {compression}, and the file is cut off or damaged.",
        where=where,
        found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
        next_command="copy or download the file again, and compare its size with the source's",
    )


def needs_pyarrow(what: str, where: str) -> ConfigError:
    """Return the error for data that pyarrow reads, on a machine without it."""
    return ConfigError(
        f"{what}: reading it needs packages that are not installed here.",
        where=where,
        expected="pyarrow and datasets, the extra 'data' of mixtral-run",
        next_command="pip install 'mixtral-run[data]'; or convert the data to JSONL",
    )


def _open_zstd(path: Path) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise needs_pyarrow("The file is compressed with Zstandard", str(path)) from error
    # pyarrow's stream has no limited readline.
    stream: IO[bytes] = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), HEAD_BYTES)
    return stream


_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "Zstandard"))
_UNPACK = {"gzip": "gzip -dk", "bzip2": "bzip2 -dk", "xz": "xz -dk", "Zstandard": "zstd -dk"}
_OPENERS: dict[str | None, Callable[[Path], IO[bytes]]] = {
    None: lambda path: path.open("rb"),
    "gzip": lambda path: io.BufferedReader(gzip.GzipFile(path), HEAD_BYTES),
    "bzip2": lambda path: io.BufferedReader(bz2.BZ2File(path), HEAD_BYTES),
    "xz": lambda path: io.BufferedReader(lzma.LZMAFile(path), HEAD_BYTES),  # noqa: SIM115
    "Zstandard": _open_zstd,
}


def _read_head(stream: IO[bytes]) -> bytes:
    parts: list[bytes] = []
    while sum(map(len, parts)) < HEAD_BYTES and (part := stream.read(HEAD_BYTES)):
        parts.append(part)
    return b"".join(parts)


def _format_of_head(head: bytes, path: Path, where: str) -> Format:
    for start, name in _TABLES:
        if head.startswith(start):
            return Format(name)
    if head.startswith(b"PK\x03\x04"):
        for inside, name, command in _ZIPS:
            if inside in head[:4096]:
                raise _refused(name, where, command)
    for start, name, command in _REFUSED:
        if head.lstrip().startswith(start):
            raise _refused(name, where, command.format(path=path))
    encoding = next((name for mark, name in _ENCODINGS if head.startswith(mark)), "utf-8")
    if encoding.startswith("utf-8") and b"\x00" in head and not _is_damaged_json(head):
        raise _binary(head, path, where)
    if head[257:262] == b"ustar":
        raise _refused("a tar archive", where, f"tar -xf {path}, then the unpacked files")
    text = codecs.getincrementaldecoder(encoding)(errors="replace").decode(head)
    return _format_of_text(text, encoding, path, where)


_MOST_NUL_BYTES = 128


def _is_damaged_json(head: bytes) -> bool:
    """Return True for lines of JSON with NUL bytes, as a disk leaves them after a crash: each bad line is named."""
    first = head.lstrip(codecs.BOM_UTF8 + b" \t\r\n").split(b"\n", 1)[0]
    # The second byte tells UTF-16 without a mark apart.
    if not first.startswith((b"{", b"[")) or first[1:2] == b"\x00":
        return False
    rest = head.rstrip(b"\x00")
    return rest.count(0) <= max(_MOST_NUL_BYTES, len(rest) // 100)


def _binary(head: bytes, path: Path, where: str) -> ConfigError:
    """Return the error for a file with zero bytes: UTF-16 without a mark, or no text at all."""
    if head[257:262] == b"ustar":
        return _refused("a tar archive", where, f"tar -xf {path}, then the unpacked files")
    for at, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros = head[at::2].count(0)
        if zeros > len(head) // 3 and head[1 - at :: 2].count(0) == 0:
            return _refused(
                f"{name} without a byte order mark", where, f"iconv -f {name} -t UTF-8 {path} > {path}.utf8.jsonl"
            )
    return _refused("of no known format", where, f"file {path}")


def _refused(name: str, where: str, command: str) -> ConfigError:
    return ConfigError(
        f"The data are {name}.",
        where=where,
        expected="JSONL, JSON, CSV, TSV, Parquet or Arrow",
        next_command=command,
    )


def _format_of_text(text: str, encoding: str, path: Path, where: str) -> Format:
    """Return the format of a text by its beginning."""
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        return Format(None, encoding)
    first = lines[0].lstrip()
    if first.startswith("["):
        return Format(JSON, encoding)
    if first.startswith("{"):
        return Format(JSON if _continues(lines) else JSONL, encoding)
    name = path.name.lower()
    counts = {delimiter: _outside_quotes(first).count(delimiter) for delimiter in ",\t;|"}
    delimiter = max(counts, key=counts.__getitem__)
    is_header = any(word.strip(' "\r') in FIELDS for word in first.split(delimiter))
    if is_header or ".csv" in name or ".tsv" in name or (counts[delimiter] and ".json" not in name):
        return Format(CSV, encoding, delimiter)
    if ".json" not in name:
        command = f"jq -Rsc '{{text: .}}' {path} > {path.stem}.jsonl, which makes one example of the file"
        raise _refused("plain text", where, command)
    # Every line then is a problem, named with its number.
    return Format(JSONL, encoding)


def _continues(lines: list[str]) -> bool:
    """Return True if an object goes on after the first line, as pretty-printed ones do."""
    try:
        JsonReader().decode(lines[0])
    except ValueError:
        return len(lines) > 1 and not lines[1].lstrip().startswith(("{", "["))
    except RecursionError:
        pass
    return False


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])
