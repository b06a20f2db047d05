"""Whether somebody works on a host, so that engine and GPUs have to be left alone. Looks, and changes nothing."""

from __future__ import annotations

import glob

from ansible.module_utils.mixtral_run_host.commands import MISSING, last_lines, run
from ansible.module_utils.mixtral_run_host.files import read_text

# What `systemctl is-active` says of a unit that certainly does not run. Anything else, or no answer, may be a running one.
STOPPED = ("inactive", "failed", "unknown")


def why_busy():
    """Why the engine must not be stopped now, in words; empty when nothing runs."""
    return _containers() or _gpu_processes()


def compute_pids():
    """Processes that compute on the host's GPUs; none where nvidia-smi does not tell."""
    answer = run(["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"], timeout=30)
    return [word for word in answer.out.split() if word.isdigit()] if answer.code == 0 else []


def _containers():
    # Asking a stopped engine would start it, where its socket listens.
    state = run(["systemctl", "is-active", "docker.service"]).out.strip()
    if state not in STOPPED:
        answer = run(["docker", "ps", "--format", "{{.Names}}"], timeout=30)
        if answer.code == 0:
            names = answer.out.split()
            return "{} ({})".format(_count(len(names)), ", ".join(names[:5])) if names else ""
        if answer.code != MISSING:
            return "the engine runs and does not say what runs in it: {}".format(last_lines(answer, 1))
    # Each container has a shim, which goes on while the engine is stopped (live-restore).
    shims = [path for path in glob.glob("/proc/[0-9]*/comm") if _command(path).startswith("containerd-shim")]
    return "{} beside the engine".format(_count(len(shims))) if shims else ""


def _command(path):
    try:
        return read_text(path, "")
    except OSError:
        return ""  # it ended meanwhile


def _count(number):
    return "{} container{} running".format(number, "" if number == 1 else "s")


def _gpu_processes():
    pids = compute_pids()
    return "GPU processes are running (pid {})".format(", ".join(pids[:5])) if pids else ""
