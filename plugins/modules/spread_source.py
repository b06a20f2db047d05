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
    For an image, also C(file), its archive, if it exists, or else C(num_bytes), which the archive will take.
  - C(saved) writes the archive of an image if it is missing and returns C(file). Saving takes minutes, so the other host
    tries the connection first.
  - C(closed) removes the line and the program, or those of all hosts if no asker is given. C(finished) removes the archive of an image that served other hosts,
    unless a host can still read it.
options:
  state: {description: C(open) and C(saved) allow the reading. C(closed) and C(finished) end it., type: str, choices: [open, saved, closed, finished], required: true}
  asker: {description: Name of the host that reads., type: str, default: ""}
  run_id: {description: Name of this run of Ansible. C(closed) with an asker takes back the keys of this run only., type: str, default: ""}
  user: {description: "Login user. Empty means the user who became root.", type: str, default: ""}
  folder: {description: Folder whose files are served. They are named by their hash., type: path}
  image: {description: ID of an image. Its archive is served instead of a folder., type: str, default: ""}
  most: {description: Number of hosts that may read at once., type: int, default: 2}
  mib_per_second: {description: Rate of this host for all that read from it. 0 is no limit., type: float, default: 0}
  hours: {description: Hours until the key expires., type: int, default: 12}
  force: {description: "With C(finished), remove the archive in any case.", type: bool, default: false}
  keep: {description: "With C(closed), keep the archive of an image for further hosts.", type: bool, default: true}
"""

import os

from ..module_utils.mixtral_run_host.spread.archive import ImageArchive
from ..module_utils.mixtral_run_host.spread.blobs import CopyError
from ..module_utils.mixtral_run_host.spread.keys import Doors, host_keys
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "state": {"type": "str", "choices": ["open", "saved", "closed", "finished"], "required": True},
    "asker": {"type": "str", "default": ""},
    "run_id": {"type": "str", "default": ""},
    "user": {"type": "str", "default": ""},
    "folder": {"type": "path"},
    "image": {"type": "str", "default": ""},
    "most": {"type": "int", "default": 2},
    "mib_per_second": {"type": "float", "default": 0},
    "hours": {"type": "int", "default": 12},
    "force": {"type": "bool", "default": False},
    "keep": {"type": "bool", "default": True},
}


def main():
    run_module(act, OPTIONS)


def act(module):
    params, archive = module.params, ImageArchive()
    if params["state"] == "finished" and params["force"]:
        module.exit_json(changed=archive.exists() if module.check_mode else archive.remove())
    try:
        doors = Doors(params["user"], params["run_id"])
    except KeyError as error:
        module.exit_json(changed=False, problem=str(error).strip("'\""))
    if params["state"] == "finished":
        # A host that goes its own way may still read.
        would = archive.exists() and not doors.open_for()
        module.exit_json(changed=would if module.check_mode else archive.remove(doors.open_for))
    if module.check_mode:
        module.exit_json(changed=False)
    if params["state"] == "closed":
        changed = doors.close(params["asker"]) if params["asker"] else doors.close_all()
        if not params["keep"]:
            archive.remove(doors.open_for)
        module.exit_json(changed=changed)
    if not params["image"]:
        _open_folder(module, doors, params["folder"] or "")
    with archive.locked():
        try:
            (_save if params["state"] == "saved" else _open)(module, doors, archive)
        except CopyError as error:
            module.exit_json(changed=False, problem=error.what)


def _open(module, doors, archive):
    image = module.params["image"]
    file = archive.known(image)
    if file is not None:
        _open_folder(module, doors, archive.blobs_folder, file=list(file))
    num_bytes = archive.needed_bytes(image)
    os.makedirs(archive.blobs_folder, mode=0o755, exist_ok=True)
    _open_folder(module, doors, archive.blobs_folder, num_bytes=num_bytes)


def _save(module, doors, archive):
    missing = archive.known(module.params["image"]) is None
    module.exit_json(changed=missing, file=list(archive.save(module.params["image"], doors.gid)))


def _open_folder(module, doors, folder, **answer):
    params = module.params
    if not os.path.isdir(folder):
        module.exit_json(changed=False, problem="it does not have {}".format(folder))
    rate = int(params["mib_per_second"] * 2**20 / params["most"])
    key, problem = doors.open(params["asker"], folder, rate, params["hours"], params["most"])
    if key is None:
        module.exit_json(changed=False, problem=problem)
    module.exit_json(changed=True, private_key=key, user=doors.name, host_keys=host_keys(), **answer)


if __name__ == "__main__":
    main()
