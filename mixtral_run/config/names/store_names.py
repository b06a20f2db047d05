"""URLs of folders in object stores, such as s3://bucket/run. Standard library only.

A setting that holds a path may hold a URL. `Path` keeps it with one slash behind the colon; `store_url` gives it back.
"""

from __future__ import annotations

import re
from pathlib import PurePath

SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs"}
"""Schemes of the URLs, and the package that fsspec needs for each."""

_URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+]{1,14}):/{1,2}(?P<rest>[^/].*)")


def store_url(value: object) -> str | None:
    """Return the URL that a setting's value is; None for any other value, such as a path of this machine."""
    if not isinstance(value, (str, PurePath)):
        return None
    found = _URL.fullmatch(str(value))
    return f"{found['scheme']}://{found['rest'].rstrip('/')}" if found else None


def without_weight(value: object) -> object:
    """Return `--adapter URL[:WEIGHT]` without its weight, and any other value unchanged."""
    return re.sub(r":[-+.0-9eE]+$", "", value) if isinstance(value, str) else value


def url_problem(url: str) -> str | None:
    """Return why a URL names no folder of an object store that the kit can use, or None.

    The text does not repeat the URL, which may hold a password.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, folder = rest.partition("/")
    if scheme not in SCHEMES:
        return f"expected a path, or a URL with {', '.join(each + '://' for each in SCHEMES)}; found {scheme}://"
    if "@" in bucket and scheme == "s3":
        return "expected a URL without a user or password, which records would repeat; found an @ before the folder"
    if not folder or not all(part not in ("", ".", "..") for part in folder.split("/")):
        return f"expected {scheme}://BUCKET/FOLDER; found no folder of a bucket"
    if not re.fullmatch(r"[A-Za-z0-9._@-]+", bucket) or not re.fullmatch(r"[A-Za-z0-9!_.*'()/=+ -]+", folder):
        return f"expected {scheme}://BUCKET/FOLDER of letters, digits and !_.*'()=+- ; found other characters"
    return None
