"""Keep jobs and the driver apart: the cordon, the starts that began before it, and containers that may lose their GPUs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time

from .. import files, probe
from ..engine import engine_use
from ..files import read_text, remove, write_text

CORDON = os.path.join(files.RECORD_FOLDER, "cordon.json")
CORDONED_BY = "mixtral-run, role nvidia_driver"
START_LOCK = "/tmp/mixtral-run.start.lock"
"""Lock that each start of a job holds until the engine lists its container. The start looks at the cordon under it."""
START_SECONDS = 130


def cordon():
    """Keep new jobs away until the host is back. A cordon of somebody else stays as it is."""
    if not os.path.lexists(CORDON):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        values = {"reason": "the NVIDIA driver is replaced", "by": CORDONED_BY, "at": at}
        write_text(CORDON, json.dumps(values) + "\n")


def uncordon():
    """Take the cordon of cordon() back, and not that of somebody else."""
    if is_cordoned():
        remove(CORDON)
        with contextlib.suppress(OSError):  # it holds records, or models
            os.rmdir(os.path.dirname(CORDON))


def is_cordoned():
    """Return True if the host has the cordon of cordon(). What is not readable is somebody else's."""
    try:
        with open(CORDON, "rb") as file:
            values = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("by") == CORDONED_BY


def wait_for_starts(seconds=START_SECONDS):
    """Wait on a cordoned host until no start of a job is under way. Return why that cannot be told, or an empty text.

    A job that starts has passed the cordon and is in no list of containers yet. After this, containers show all jobs.
    """
    try:
        handle = os.open(START_LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""  # no job was ever started since the host booted
    except OSError as error:
        return "the lock for starts of jobs cannot be opened: {}".format(error)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return "{} is no plain file".format(START_LOCK)
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return ""
            except BlockingIOError:
                if time.monotonic() >= until:
                    return "a start of a job does not end ({} is locked)".format(START_LOCK)
                time.sleep(0.1)
    finally:
        os.close(handle)


def why_reload_waits():
    """Return why systemd must not read its units anew now, or an empty text.

    With systemd's cgroups, `systemctl daemon-reload`, and `enable` and `disable` with it, set the devices of containers
    back to what the engine asked for. The GPUs are not among these where the engine gets them without CDI.
    """
    why = engine_use.why_busy()
    if not why or probe.cdi()["path"]:
        return ""
    return "`systemctl daemon-reload` takes the GPUs away from containers without CDI: {}".format(why)


def no_reload():
    """Return the option with which `systemctl enable` and `disable` leave the running containers their GPUs."""
    return ["--no-reload"] if why_reload_waits() else []


def boot_id():
    """Return what the kernel calls this boot, or an empty text."""
    return read_text("/proc/sys/kernel/random/boot_id", "").strip()
