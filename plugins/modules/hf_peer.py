#!/usr/bin/python
"""Allow another host to read one model of this host's HF cache for a limited time, with a restricted key."""

from __future__ import annotations

DOCUMENTATION = """
module: hf_peer
short_description: Allow another host to read one model of this host's HF cache over SSH for a limited time
description:
  - C(open) creates a key pair and adds the public key to the login user's authorized_keys. The key is restricted to a
    program that reads this one model, has no terminal and no forwarding, and expires by itself. Returns the private key
    and the SSH host keys. A problem is returned as C(problem), because the answer is excluded from logs.
  - C(closed) removes the line and the program.
options:
  state: {description: C(open) allows the reading. C(closed) ends it., type: str, choices: [open, closed], required: true}
  asker: {description: Name of the host that reads., type: str, required: true}
  user: {description: "Login user. Empty means the user who became root.", type: str, default: ""}
  home: {description: HF_HOME., type: path, required: true}
  model: {description: "Name on the hub, ORG/NAME.", type: str, required: true}
  server: {description: Source text of the program that serves the model., type: str, required: true}
  hours: {description: Hours until the key expires., type: int, default: 12}
"""

import fcntl
import glob
import os
import pwd
import re
import tempfile
import time

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.files import read_text, remove, write_text
from ..module_utils.mixtral_run_host.start import UMASK

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
    os.umask(UMASK)
    params = module.params
    name = params["user"] or os.environ.get("SUDO_USER") or "root"
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        module.exit_json(problem="there is no user {}".format(name))
    mark = "mixtral-run-model-for-" + re.sub(r"[^\w.-]", "-", params["asker"])
    program = os.path.join(PROGRAMS, mark + ".py")
    authorized = os.path.join(user.pw_dir, ".ssh", "authorized_keys")
    remove(program)
    _set_line(authorized, user, mark)
    if params["state"] == "closed":
        module.exit_json(changed=True)
    folder = os.path.join(params["home"], "hub", "models--" + params["model"].replace("/", "--"))
    if not os.path.isdir(os.path.join(folder, "snapshots")):
        module.exit_json(problem="it does not have {}: there is no {}/snapshots".format(params["model"], folder))
    write_text(program, params["server"], mode=0o755)
    private, public = _key_pair(mark)
    if private is None:
        module.exit_json(problem=public)
    until = time.strftime("%Y%m%d%H%MZ", time.gmtime(time.time() + params["hours"] * 3600))
    command = "/usr/bin/env python3 {} {}".format(program, folder)
    _set_line(authorized, user, mark, 'restrict,expiry-time="{}",command="{}" {}\n'.format(until, command, public))
    module.exit_json(changed=True, private_key=private, user=name, host_keys=_host_keys())


def _key_pair(mark):
    """Return the private and the public half of a new key, or None and the error message."""
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
    """Replace the line of the host that `mark` names by `line`; an empty `line` removes it.

    Several hosts may ask at the same time, in separate processes. A lock on the folder makes them wait for each other.
    """
    folder = os.path.dirname(authorized)
    missing = not os.path.isdir(folder)
    if missing:
        if not line:
            return
        os.makedirs(folder, mode=0o700, exist_ok=True)
    # The user can replace the new folder by a link before it gets its owner.
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | (os.O_NOFOLLOW if missing else 0))
    try:
        if missing:
            os.fchown(lock, user.pw_uid, user.pw_gid)
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = read_text(authorized) or ""
        kept = "".join(each for each in text.splitlines(True) if not each.rstrip("\n").endswith(" " + mark))
        if line and kept and not kept.endswith("\n"):
            kept += "\n"
        if kept + line != text:
            owner = (user.pw_uid, user.pw_gid)  # sshd reads the file as this user, at any time
            write_text(os.path.realpath(authorized), kept + line, mode=0o600, owner=owner)
    finally:
        os.close(lock)


if __name__ == "__main__":
    main()
