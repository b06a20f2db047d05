"""Functions that read which Docker engine a host has: its unit, its flags, and engines of another kind."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex

from ..commands import run
from ..files import read_text
from . import engine_flags

DATA_ROOT = "/var/lib/docker"
SNAP = ("/snap/docker/current", "/var/lib/snapd/snap/docker/current")
ROOTLESS = ("/home/*/.config/systemd/user/docker.service", "/root/.config/systemd/user/docker.service")
_PROPERTIES = "ExecStart,EnvironmentFiles,Environment,FragmentPath,DropInPaths"


def unit():
    """Return {"argv", "files"} of docker.service: its command line, and the files of somebody that set it."""
    answer = run(["systemctl", "show", "docker.service", "--property=" + _PROPERTIES])
    shown = dict(line.partition("=")[::2] for line in answer.out.splitlines())
    start = re.search(r"argv\[\]=(.*?) ; (?:ignore_errors|flags)=", shown.get("ExecStart", ""))
    if start is None:
        return {"argv": [], "files": []}
    files = [shown.get("FragmentPath", "")] + shown.get("DropInPaths", "").split()
    theirs = [path for path in files if path.startswith("/etc/") and "ExecStart" in read_text(path, "")]
    return {"argv": engine_flags.expand(start.group(1).split(), _environment(shown)), "files": theirs}


def _environment(shown):
    """Return the variables that systemd sets for the command line."""
    found = dict(word.partition("=")[::2] for word in _words(shown.get("Environment", "")))
    for path in re.findall(r"(/\S+)", shown.get("EnvironmentFiles", "")):
        for line in read_text(path, "").splitlines():
            name, equals, value = line.strip().partition("=")
            if equals and not name.startswith("#"):
                found[name] = " ".join(_words(value))
    return found


def _words(text):
    try:
        return shlex.split(text)
    except ValueError:
        return text.split()


def conflicts(params, owned):
    """Return (level, expected, found, next step) for each conflict, and the settings of the host that stay.

    params: settings, defaults, needed, conflicting and path, as in the module engine_conflicts. owned: the entries of the
    kit's section of daemon.json.
    """
    found = list(_other_engines(params["conflicting"]))
    try:
        current = json.loads(read_text(params["path"]) or "{}")
    except ValueError:
        current = {}  # daemon_json reports it
    given = engine_flags.flags(unit()["argv"][1:])
    current = current if isinstance(current, dict) else {}
    defaults = usable_defaults(params["defaults"], current, given)
    settled = engine_flags.settle(params["settings"], defaults, params["needed"], current, owned, given)
    return found + [("fail",) + tuple(each) for each in settled.conflicts], settled.kept


def usable_defaults(defaults, current, given):
    """Return the defaults without live-restore if the engine is in a swarm, where it does not start with it."""
    root = (given.get("data-root") or [current.get("data-root") or DATA_ROOT])[-1]
    if not os.path.exists(os.path.join(root, "swarm", "docker-state.json")):
        return defaults
    return {key: value for key, value in defaults.items() if key != "live-restore"}


def _other_engines(packages):
    snap = next((path for path in SNAP if os.path.exists(path)), None)
    if snap:
        yield (
            "fail", "Docker from packages, or none", "Docker from snap ({}), which uses the same socket".format(snap),
            "save its images and volumes, then `sudo snap remove docker`",
        )  # fmt: skip
    for path in sorted(each for pattern in ROOTLESS for each in glob.glob(pattern)):
        user = path.split("/")[2] if path.startswith("/home/") else "root"
        yield (
            "warn", "one engine", "rootless Docker of the user {} ({})".format(user, path),
            "it stays, with images of its own; jobs use the engine of the host: `docker context use default` as this user",
        )  # fmt: skip
    found = unit()
    program = found["argv"][0] if found["argv"] else ""
    if not found["files"] or not program:
        return
    owner = run(["dpkg-query", "--search", program]).out.partition(":")[0]
    if owner in packages:
        yield (
            "fail", "a unit that starts the engine of docker-ce, /usr/bin/dockerd",
            "{} starts {} of the package {}, which the role replaces".format(", ".join(found["files"]), program, owner),
            "name /usr/bin/dockerd there, or remove ExecStart from it; the engine was left as it is",
        )  # fmt: skip
