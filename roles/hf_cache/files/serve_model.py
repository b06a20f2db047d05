#!/usr/bin/python3
"""Serve one model of this host's HF cache over SSH. The temporary key of another host may run only this program.

    serve_model.py FOLDER        FOLDER: HF_HOME/hub/models--ORG--NAME

SSH_ORIGINAL_COMMAND is `list REVISION` (JSON: the commit, and path, size and hash of each file) or `get HASH START`
(the bytes of a file from START on).
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

DIGEST = "[0-9a-f]{40}|[0-9a-f]{64}"


def list_files(folder, revision):
    reference = folder / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if re.fullmatch(DIGEST, commit) is None or not snapshot.is_dir():
        return f"{folder} has no revision {revision}"
    # Every file of the hub is a link into blobs/; the quantized cache that finetune writes next to them is not.
    links = sorted(each for each in snapshot.rglob("*") if each.is_symlink() and each.is_file())
    files = [[str(each.relative_to(snapshot)), each.stat().st_size, each.resolve().name] for each in links]
    json.dump({"commit": commit, "files": files}, sys.stdout)
    return None


def get_file(folder, digest, start):
    with (folder / "blobs" / digest).open("rb") as file:
        file.seek(start)
        shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)


def main(folder, command):
    asked = re.fullmatch(rf"list (?![/.])(?!.*\.\.)([\w./-]+)|get ({DIGEST}) ([0-9]{{1,18}})", command)
    if asked is None:
        return "only list REVISION and get HASH START are served"
    try:
        return list_files(folder, asked[1]) if asked[1] else get_file(folder, asked[2], int(asked[3]))
    except OSError as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), os.environ.get("SSH_ORIGINAL_COMMAND", "")))
