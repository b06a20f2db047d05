#!/usr/bin/python
"""Let another host read files of this host over SSH for a limited time, with a restricted key."""

from __future__ import annotations

DOCUMENTATION = """
module: spread_source
short_description: Let another host read files of one folder of this host over SSH for a limited time
description:
  - C(open) creates a key pair and adds the public key to the login user's authorized_keys. The key is restricted to a
    program that reads the files of this one folder, has no terminal and no forwarding, and expires by itself. Returns
    the private key and the SSH host keys. A problem is returned as C(problem), because the answer is excluded from logs.
  - C(closed) removes the line and the program, or those of all hosts if no asker is given. C(finished) removes the archive of an image that served other hosts.
options:
  state: {description: C(open) allows the reading. C(closed) and C(finished) end it., type: str, choices: [open, closed, finished], required: true}
  asker: {description: Name of the host that reads., type: str, default: ""}
  user: {description: "Login user. Empty means the user who became root.", type: str, default: ""}
  folder: {description: Folder whose files are served. They are named by their hash., type: path}
  image: {description: ID of an image. Its archive is served instead of a folder and is written first if it is missing., type: str, default: ""}
  most: {description: Number of hosts that may read at once., type: int, default: 2}
  mib_per_second: {description: Rate of this host for all that read from it. 0 is no limit., type: float, default: 0}
  hours: {description: Hours until the key expires., type: int, default: 12}
  keep: {description: "With C(closed), keep the archive of an image for further hosts.", type: bool, default: true}
"""

import os

from ..module_utils.mixtral_run_host.spread.archive import ImageArchive
from ..module_utils.mixtral_run_host.spread.blobs import CopyError
from ..module_utils.mixtral_run_host.spread.keys import Doors, host_keys
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "state": {"type": "str", "choices": ["open", "closed", "finished"], "required": True},
    "asker": {"type": "str", "default": ""},
    "user": {"type": "str", "default": ""},
    "folder": {"type": "path"},
    "image": {"type": "str", "default": ""},
    "most": {"type": "int", "default": 2},
    "mib_per_second": {"type": "float", "default": 0},
    "hours": {"type": "int", "default": 12},
    "keep": {"type": "bool", "default": True},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params, archive = module.params, ImageArchive()
    try:
        doors = Doors(params["user"])
    except KeyError as error:
        module.exit_json(changed=False, problem=str(error).strip("'\""))
    if params["state"] == "finished":
        # A host that goes its own way may still read.
        removed = not module.check_mode and not doors.open_for() and archive.remove()
        module.exit_json(changed=bool(removed))
    if module.check_mode:
        module.exit_json(changed=False)
    if params["state"] == "closed":
        changed = doors.close(params["asker"]) if params["asker"] else doors.close_all()
        if not params["keep"] and not doors.open_for():
            archive.remove()
        module.exit_json(changed=changed)
    _open(module, doors, archive)


def _open(module, doors, archive):
    params, answer = module.params, {}
    folder = params["folder"] or ""
    try:
        if params["image"]:
            file = archive.save(params["image"], doors.gid)
            answer, folder = {"file": list(file)}, archive.blobs_folder
    except CopyError as error:
        module.exit_json(changed=False, problem=error.what)
    if not os.path.isdir(folder):
        module.exit_json(changed=False, problem="it does not have {}".format(folder))
    rate = int(params["mib_per_second"] * 2**20 / params["most"])
    key, problem = doors.open(params["asker"], folder, rate, params["hours"], params["most"])
    if key is None:
        module.exit_json(changed=False, problem=problem)
    module.exit_json(changed=True, private_key=key, user=doors.name, host_keys=host_keys(), **answer)


if __name__ == "__main__":
    main()
