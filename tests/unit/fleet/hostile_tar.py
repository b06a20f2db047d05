"""Tar streams that a host may send in the place of the folder `peft`. Those that reach out aim at a file `escaped`."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Any

FILE, LINK, HARD, FOLDER, FIFO = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE
PEFT = ("peft", FOLDER)
Entry = tuple[Any, ...]
"""(name, type), then the content of a file or the target of a link, then the mode."""


def beyond_path_max() -> list[Entry]:
    """CVE-2025-4517: links whose resolved path is longer than PATH_MAX, so that a check looks at another place."""
    name, steps, path, found = "d" * 247, "abcdefghijklmnop", "", []
    for step in steps:
        found += [(os.path.join(path, name), FOLDER), (os.path.join(path, step), LINK, name)]  # noqa: PTH118
        path = os.path.join(path, name)  # noqa: PTH118
    far = os.path.join("/".join(steps), "l" * 254)  # noqa: PTH118
    escape = [(far, LINK, "../" * len(steps)), ("escape", LINK, far + "/../../.."), ("escape/escaped", FILE, b"x")]
    return [*found, *escape, PEFT]


CASES: dict[str, list[Entry]] = {
    "dotdot": [("../../escaped", FILE, b"x")],
    "dotdot_inside": [PEFT, ("peft/../../escaped", FILE, b"x")],
    "absolute": [("/escaped", FILE, b"x")],
    "link_outside": [("peft", LINK, "/"), ("peft/escaped", FILE, b"x")],
    "relative_link_outside": [PEFT, ("peft/l", LINK, "../../.."), ("peft/l/escaped", FILE, b"x")],
    "link_outside_that_nothing_uses": [PEFT, ("peft/l", LINK, "../../escaped")],
    "absolute_link": [PEFT, ("peft/l", LINK, "/etc/passwd")],
    "link_through_a_link": [
        PEFT, ("peft/a", FOLDER), ("peft/a/b", LINK, "."), ("peft/c", LINK, "a/b/../../escaped"),
    ],
    "link_that_becomes_a_parent": [PEFT, ("peft/l", LINK, "a"), ("peft/a", FOLDER), ("peft/l/escaped", FILE, b"x")],
    "hard_link": [("peft", HARD, "/etc/passwd")],
    "hard_link_outside": [PEFT, ("peft/a", HARD, "../../etc/passwd")],
    "hard_link_to_a_link": [PEFT, ("peft/l", LINK, "x"), ("peft/a", HARD, "peft/l")],
    "fifo": [("peft", FIFO)],
    "device": [PEFT, ("peft/null", tarfile.CHRTYPE)],
    "another_name": [("other", FILE, b"x")],
    "nothing": [],
    "name_twice": [("peft", FILE, b"x"), PEFT, ("peft/y", FILE, b"z")],
    "file_twice": [PEFT, ("peft/y", FILE, b"x"), ("peft/y", FILE, b"z")],
    "file_then_inside_it": [("peft", FILE, b"x"), ("peft/y", FILE, b"z")],
    "control_characters": [("peft\x01\x1b]0;x\x07", FILE, b"x")],
    "control_characters_inside": [PEFT, ("peft/a\x1b[31m", FILE, b"x")],
    "long_name": [("peft/" + "a" * 5000, FILE, b"x")],
    "link_to_nothing": [("peft", LINK, "x")],
    "beyond_path_max": beyond_path_max(),
}  # fmt: skip


def stream(entries: list[Entry]) -> bytes:
    """Return the tar stream of some entries."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, kind, *more in entries:
            entry = tarfile.TarInfo(name)
            entry.type, content = kind, b""
            entry.mode = more[1] if len(more) > 1 else 0o755 if kind == FOLDER else 0o644
            if kind in (LINK, HARD):
                entry.linkname = more[0]
            elif more:
                content = more[0]
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return target.getvalue()
