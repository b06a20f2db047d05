"""Read-only checks if containers or GPU processes run on a host, so that the engine and the GPUs must be left alone."""

from __future__ import annotations

import glob

from ..commands import MISSING, last_lines, run
from ..files import read_text

# Answers of `systemctl is-active` for a unit that does not run. With any other answer, or none, the unit may run.
STOPPED = ("inactive", "failed", "unknown")


def all_that_runs():
    """Return all reasons why the engine must not be removed now, with every container and every process on the GPUs."""
    return "; ".join(filter(None, (_containers(None), _gpu_processes(None))))


def why_busy():
    """Return the reason why the engine must not be stopped now, or an empty string if nothing runs."""
    return _containers() or _gpu_processes()


def compute_pids():
    """Return the IDs of the processes that compute on the host's GPUs, or an empty list if nvidia-smi fails."""
    answer = run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], timeout=30)
    return [word for word in answer.out.split() if word.isdigit()] if answer.code == 0 else []


def _containers(most=5):
    # A request to a stopped engine would start it through its systemd socket.
    state = run(["systemctl", "is-active", "docker.service"]).out.strip()
    if state not in STOPPED:
        answer = run(["docker", "ps", "--format", "{{.Names}}"], timeout=30)
        if answer.code == 0:
            names = answer.out.split()
            return "{} ({})".format(_count(len(names)), ", ".join(names[:most])) if names else ""
        if answer.code != MISSING:
            return "the engine runs and does not say what runs in it: {}".format(last_lines(answer, 1))
    # Each container has a shim, which continues while the engine is stopped (live-restore).
    shims = [path for path in glob.glob("/proc/[0-9]*/comm") if _command(path).startswith("containerd-shim")]
    return "{} beside the engine".format(_count(len(shims))) if shims else ""


def _command(path):
    try:
        return read_text(path, "")
    except OSError:
        return ""  # the process has ended in the meantime


def _count(number):
    return "{} container{} running".format(number, "" if number == 1 else "s")


def _gpu_processes(most=5):
    pids = compute_pids()
    return "GPU processes are running (pid {})".format(", ".join(pids[:most])) if pids else ""
