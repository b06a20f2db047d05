"""Functions that read which Docker engine a host has: its unit, its flags, and engines of another kind."""

from __future__ import annotations

import glob
import os
import pwd
import re
import shlex

from ..commands import MISSING, last_lines, run
from ..files import read_text
from . import engine_flags, settings_file

DATA_ROOT = "/var/lib/docker"
SNAP = ("/snap/docker/current", "/var/lib/snapd/snap/docker/current")
ROOTLESS = ("/home/*/.config/systemd/user/docker.service", "/root/.config/systemd/user/docker.service")
NO_SETTINGS = {
    "settings": {}, "defaults": {}, "needed": {}, "conflicting": [], "users": [], "unusable": [], "config_files": [],
    "restore": True, "path": "/etc/docker/daemon.json",
}  # fmt: skip
"""What the kit asks of an engine if nothing is set."""
NO_OTHER = "no packages that conflict with Docker's own"
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

    params: settings, defaults, needed, conflicting, users, unusable, config_files, restore and path, as in the module
    engine_conflicts. owned: the entries of the kit's section of daemon.json.
    """
    params = dict(NO_SETTINGS, **params)
    found = list(_other_engines(params["conflicting"])) + list(_unusable(params)) + list(_replacements(params))
    path = params["path"]
    try:
        current = settings_file.read_settings(path)[0]
    except settings_file.BadSettings as error:
        return found + [("fail", error.expected, error.found, error.step)], []
    why = settings_file.why_not_writable(path)
    if why:
        found.append(
            ("fail", "{} can be written".format(path), why, "make it writable: `findmnt --target {}`".format(path))
        )
    argv = unit()["argv"][1:]
    given = engine_flags.flags(argv)
    defaults = usable_defaults(params["defaults"], current, given)
    step = settings_file.CORRECT.format(path)
    wrong = list(settings_file.misfits(current, dict({"runtimes": {}}, **dict(defaults, **params["settings"]))))
    found += [("fail", "{} of {} is {}".format(name, path, kind), seen, step) for name, kind, seen in wrong]
    if wrong:
        return found, []
    refused = _refused_by_engine(path, argv)
    if refused:
        found.append(("fail", "{} holds settings that `dockerd --validate` accepts".format(path), refused, step))
    settled = engine_flags.settle(params["settings"], defaults, params["needed"], current, owned, given)
    return found + [("fail",) + tuple(each) for each in settled.conflicts], settled.kept


def _refused_by_engine(path, argv):
    """Return why the engine of the host does not take its file as it is, or an empty string. Docker 23 and newer."""
    if not os.path.exists(path) or "--validate" not in run(["dockerd", "--help"]).out:
        return ""
    # A setting in the unit and in the file is reported as a conflict of its own.
    answer = run(["dockerd", "--validate", "--config-file", path] + argv)
    if answer.code in (0, MISSING) or "both as a flag" in answer.out + answer.err:
        return ""
    return last_lines(answer, 1)


def _unusable(params):
    """Yield what the role would refuse after it has replaced the engine: users, and values that break a unit's line."""
    for name in params["users"]:
        try:
            pwd.getpwnam(name)
        except KeyError:
            step = "create the user, or take the name out of the list"
            yield (
                "fail",
                "each name of docker_users and docker_add_users is a user of the host",
                "no user {}".format(ascii(name)),
                step,
            )
    for name in params["unusable"]:
        step = "correct {}".format(name)
        yield "fail", "{} without control characters, quotes and backslashes".format(name), "one of them", step


def replaced_packages(conflicting):
    """Return "NAME VERSION" of the installed packages that conflict with the kit's."""
    if not conflicting:
        return []
    shown = "${Package} ${Version} ${db:Status-Status}\n"
    rows = [
        line.split() for line in run(["dpkg-query", "--show", "--showformat", shown] + conflicting).out.splitlines()
    ]
    return [" ".join(row[:2]) for row in rows if len(row) == 3 and row[2] == "installed" and row[0] in conflicting]


def announcements(found):
    """Return the sentences that an operator reads before the role replaces packages of the host."""
    words = "before anything is changed: found {}; {}"
    return [words.format(seen, step) for _, expected, seen, step in found if expected == NO_OTHER]


def _replacements(params):
    """Yield a warning that announces which packages of the host the role replaces."""
    found = replaced_packages(params["conflicting"])
    if not found:
        return
    files = [path for path in params["config_files"] if os.path.exists(path)]
    kept = "their versions{} are recorded, and teardown puts them back".format(
        " and the files {}".format(", ".join(files)) if files else ""
    )
    end = kept if params["restore"] else "teardown does not put them back (docker_restore_replaced: false)"
    yield (
        "warn", NO_OTHER, ", ".join(found),
        "nothing to do: the docker role replaces these packages by Docker's own; {}. To keep them, leave the role out "
        "(--tags)".format(end),
    )  # fmt: skip


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
