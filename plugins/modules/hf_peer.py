#!/usr/bin/python
"""A host lets another one read a model of its HF cache for a while, by a key that may do nothing else."""

from __future__ import annotations

DOCUMENTATION = """
module: hf_peer
short_description: Lets another host read one model of this host's HF cache over SSH, for a while
description:
  - C(open) makes a key pair, puts its public half into the login user's authorized_keys, bound to a program that reads
    this one model, without terminal or forwarding, and ending by itself; returns the private half and the host's keys.
    What stands against it is returned as C(fault), since the answer is kept out of logs.
  - C(closed) takes the line and the program away again.
options:
  state: {description: Open or closed., type: str, choices: [open, closed], required: true}
  asker: {description: Name of the host that reads., type: str, required: true}
  user: {description: "Login user; empty: the one who became root.", type: str, default: ""}
  home: {description: HF_HOME., type: path, required: true}
  model: {description: "Name on the hub, ORG/NAME.", type: str, required: true}
  server: {description: Text of the program., type: str, required: true}
  hours: {description: When the key ends by itself., type: int, default: 12}
"""

import fcntl
import glob
import os
import pwd
import re
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.mixtral_run_host.commands import last_lines, run
from ansible.module_utils.mixtral_run_host.files import read_text, remove, write_text

PROGRAMS = "/var/lib/mixtral-run/serve-model"


def main():
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["open", "closed"], "required": True},
            "asker": {"type": "str", "required": True},
            "user": {"type": "str", "default": ""},
            "home": {"type": "path", "required": True},
            "model": {"type": "str", "required": True},
            "server": {"type": "str", "required": True},
            "hours": {"type": "int", "default": 12},
        }
    )
    params = module.params
    name = params["user"] or os.environ.get("SUDO_USER") or "root"
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        module.exit_json(fault="there is no user {}".format(name))
    mark = "mixtral-run-model-for-" + re.sub(r"[^\w.-]", "-", params["asker"])
    program = os.path.join(PROGRAMS, mark + ".py")
    authorized = os.path.join(user.pw_dir, ".ssh", "authorized_keys")
    remove(program)
    _set_line(authorized, user, mark)
    if params["state"] == "closed":
        module.exit_json(changed=True)
    folder = os.path.join(params["home"], "hub", "models--" + params["model"].replace("/", "--"))
    if not os.path.isdir(os.path.join(folder, "snapshots")):
        module.exit_json(fault="it does not have {}: there is no {}/snapshots".format(params["model"], folder))
    write_text(program, params["server"], mode=0o755)
    private, public = _key_pair(mark)
    if private is None:
        module.exit_json(fault=public)
    until = time.strftime("%Y%m%d%H%MZ", time.gmtime(time.time() + params["hours"] * 3600))
    command = "/usr/bin/env python3 {} {}".format(program, folder)
    _set_line(authorized, user, mark, 'restrict,expiry-time="{}",command="{}" {}\n'.format(until, command, public))
    module.exit_json(changed=True, private_key=private, user=name, host_keys=_host_keys())


def _key_pair(mark):
    """The two halves of a fresh key; None and what failed where there is none."""
    with tempfile.TemporaryDirectory(prefix="mixtral-run-") as folder:
        path = os.path.join(folder, "key")
        made = run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", mark, "-f", path])
        if made.code:
            return None, "ssh-keygen: " + last_lines(made, 3)
        return read_text(path), read_text(path + ".pub").strip()


def _host_keys():
    found = (read_text(path) for path in sorted(glob.glob("/etc/ssh/ssh_host_*_key.pub")))
    return [" ".join(text.split()[:2]) for text in found]


def _set_line(authorized, user, mark, line=""):
    """Take the line of one asker out, and put `line` in its place.

    Several askers come at once, from processes of their own: each waits for the one before, by a lock on the folder.
    """
    folder = os.path.dirname(authorized)
    if not os.path.isdir(folder):
        if not line:
            return
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chown(folder, user.pw_uid, user.pw_gid)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = read_text(authorized) or ""
        kept = "".join(each for each in text.splitlines(True) if not each.rstrip("\n").endswith(" " + mark))
        if line and kept and not kept.endswith("\n"):
            kept += "\n"
        if kept + line != text:
            owner = (user.pw_uid, user.pw_gid)  # sshd reads it as the user, at any moment
            write_text(os.path.realpath(authorized), kept + line, mode=0o600, owner=owner)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
