"""A folder in an object store, through fsspec: list it, read and write objects, remove them.

A store has no rename. An object appears when it is complete, so a folder is complete when its marker is there, which is
written last (marker.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.home_folder import expanded
from mixtral_run.weights.store.problems import needs_package, repeated

BLOCK_BYTES = 16 * 2**20
"""Bytes of a part of an upload, and of one request of a download: what each thread holds in memory."""
MOST_PARTS = 9000
"""S3 takes at most 10,000 parts an object."""
CREDENTIALS = "store-credentials"
"""File in HF_HOME with the keys of S3, in the form of ~/.aws/credentials."""


@dataclass(frozen=True)
class StoredObject:
    """An object as a listing shows it. tag: changes with its content; empty where a store has none."""

    size: int
    tag: str = ""


@dataclass(frozen=True)
class StoreFolder:
    """A folder in a store. fs: fsspec's file system; root: the folder's path in it."""

    fs: Any
    root: str
    url: str

    def path(self, name: str) -> str:
        """Return the path of an object in the file system. name: relative to the folder."""
        return f"{self.root}/{name}"

    def objects(self) -> dict[str, StoredObject]:
        """Return all objects below the folder by their relative names. Empty if there is no such folder."""
        found = repeated(lambda: self.fs.find(self.root, detail=True))
        start = self.root.rstrip("/") + "/"
        return {
            path.removeprefix(start): StoredObject(int(info.get("size") or 0), _tag(info))
            for path, info in found.items()
            if path.startswith(start) and not path.endswith("/")
        }

    def look(self, name: str) -> StoredObject | None:
        """Return an object; None if there is none."""
        try:
            info = repeated(lambda: self.fs.info(self.path(name)))
        except FileNotFoundError:
            return None
        return StoredObject(int(info.get("size") or 0), _tag(info))

    def read(self, name: str) -> bytes:
        """Return the content of a small object."""
        content: bytes = repeated(lambda: self.fs.cat_file(self.path(name)))
        return content

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of an object from `start` up to `end`."""
        content: bytes = repeated(lambda: self.fs.cat_file(self.path(name), start=start, end=end))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small object, which appears when it is complete."""
        repeated(lambda: self.fs.pipe_file(self.path(name), content))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; one that is not there is no error."""
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                repeated(lambda name=name: self.fs.rm_file(self.path(name)))  # type: ignore[misc]


def _tag(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "md5Hash"):
        if isinstance(info.get(name), str):
            return str(info[name]).strip('"')
    return ""


def open_store(url: str) -> StoreFolder:
    """Return the folder that a URL names. Nothing is asked of the store.

    Keys come from the environment, from the client's own files, or for S3 from HF_HOME/store-credentials, never from
    a flag. Raises ConfigError if the package for such a store is not installed.
    """
    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme == "s3":
        _find_credentials()
        # This module repeats calls itself, so that a store that hangs is reported in minutes and not in an hour.
        options["config_kwargs"] = {"connect_timeout": 15, "read_timeout": 60, "retries": {"max_attempts": 2}}
    try:
        import fsspec

        fs, root = fsspec.url_to_fs(url, skip_instance_cache=True, use_listings_cache=False, **options)
    except ImportError as error:
        raise needs_package(scheme, error) from error
    return StoreFolder(fs, root.rstrip("/"), url)


def _find_credentials() -> None:
    """Let the client of S3 read HF_HOME/store-credentials, if it is there and no other keys are named."""
    given = ("AWS_ACCESS_KEY_ID", "AWS_SHARED_CREDENTIALS_FILE", "AWS_PROFILE")
    file = hf_home() / CREDENTIALS
    if not any(os.environ.get(name) for name in given) and file.is_file():
        os.environ["AWS_SHARED_CREDENTIALS_FILE"] = str(file)


def hf_home() -> Path:
    """Return the folder of Hugging Face's cache, by the rules of its own client."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(os.environ.get("HF_HOME") or f"{cache}/huggingface")
