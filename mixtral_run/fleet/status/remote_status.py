"""Program that runs on a host: reads the state of the host and prints it as one JSON object.

It is sent over SSH to `python3 -` and installs nothing. It imports only the standard library of Python 3.8 and the
modules of plugins/module_utils/mixtral_run_host that are sent along. Every reading has a time limit, so that a hanging
driver does not block it. It changes nothing.
"""

from __future__ import annotations

import json
import os
import re
import stat
import sys
import time
from typing import Any

RECORDS = "/var/lib/mixtral-run"
LABEL_JOB = "org.mixtral-run.job"
# The user of the jobs owns the folders of the checkpoints and of the models. Nothing in them may make the answer so
# long or so odd that the reader (`answer.py`) refuses the answer as a whole.
MAX_ENTRIES = 1000
MAX_MARKER_BYTES = 64
MAX_RECORD_BYTES = 1 << 20
MAX_NUMBER = 10**12


def read_status(folders: dict[str, str]) -> dict[str, Any]:
    """Return all readings. `folders`: the checkpoints folder, the HF cache and the image name on this host."""
    from ansible.module_utils.mixtral_run_host import probe  # type: ignore[import-untyped]
    from ansible.module_utils.mixtral_run_host.gpu import (  # type: ignore[import-untyped]
        gpu_driver,
        gpu_shortfalls,
        since_acceptance,
    )

    found: dict[str, Any] = probe.host([folders["checkpoints"], folders["hf_home"], "/"])
    found["hostname"] = os.uname().nodename
    found["nvlinks"] = gpu_driver.active_nvlinks() if found["gpus"] and since_acceptance.has_nvlinks(found) else None
    found["gpu_remarks"] = gpu_shortfalls.remarks(found)
    found["xid_errors"] = xid_errors()
    found["swap_used_gib"] = swap_used_gib()
    found["image"] = image(folders["image"])
    found["models"] = cached_models(folders["hf_home"])
    closed: list[str] = []
    found["checkpoints"], found["adapters"] = checkpoints(folders["checkpoints"], unreadable=closed)
    found["jobs"] = jobs()
    shown = [os.path.join(RECORDS, name + ".json") for name in ("acceptance", "cordon", "health")]
    found["unreadable"] = probe.unreadable([folders["checkpoints"], os.path.join(folders["hf_home"], "hub"), *shown])
    found["unreadable"] += [path for path in closed if path not in found["unreadable"]]
    found["root"] = os.geteuid() == 0
    found["epoch"] = int(time.time())
    return found


def _run(*argv: str) -> Any:
    from ansible.module_utils.mixtral_run_host.commands import run  # type: ignore[import-untyped]

    return run(list(argv), timeout=20)


def xid_errors() -> list[str] | None:
    """Return the kernel's messages about GPU errors since boot, or None if only root can read them."""
    answer = _run("dmesg")
    lines = answer.out.splitlines()
    if answer.code and not lines:
        return None
    return [re.sub(r"^\[[ \d.]+\] ", "", line) for line in lines if "NVRM: Xid" in line][-8:]


def swap_used_gib() -> float:
    """Return the used swap in GiB."""
    with open("/proc/meminfo", encoding="ascii") as file:
        kib = dict(re.findall(r"^(\w+):\s+(\d+)", file.read(), re.MULTILINE))
    return round((int(kib.get("SwapTotal", 0)) - int(kib.get("SwapFree", 0))) / 2**20, 2)


def image(name: str) -> dict[str, Any] | None:
    """Return id, digests (if it came from a registry) and labels of the image for jobs, or None if it is missing."""
    answer = _run("docker", "image", "inspect", "--format", "{{json .}}", name)
    try:
        details = json.loads(answer.out)
    except ValueError:
        return None
    labels = (details.get("Config") or {}).get("Labels") or {}
    return {
        "name": name,
        "id": details.get("Id", ""),
        "digests": details.get("RepoDigests") or [],
        "created": details.get("Created", ""),
        "inputs": labels.get("org.mixtral-run.inputs"),
    }


def cached_models(hf_home: str) -> list[str]:
    """Return the names of the models in the HF cache that have a snapshot."""
    hub = os.path.join(hf_home, "hub")
    found = []
    for name in sorted(_names(hub)):
        if name.startswith("models--") and _names(os.path.join(hub, name, "snapshots")):
            found.append(name[len("models--") :].replace("--", "/"))
    return found[:MAX_ENTRIES]


def checkpoints(
    folder: str, depth: int = 3, unreadable: list[str] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the converted checkpoints and the adapters below a folder that have the marker of a complete one.

    A folder whose marker or record cannot be read or is not in its form is left out. At most MAX_ENTRIES of each kind
    are returned. unreadable: gets the folders, and the checkpoints, that this user may not read.
    """
    closed: list[str] = [] if unreadable is None else unreadable

    def note(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) and len(closed) < MAX_ENTRIES:
            closed.append(str(error.filename))

    bases: list[dict[str, Any]] = []
    adapters: list[dict[str, Any]] = []
    for path, names, files in os.walk(folder, onerror=note):
        if path[len(folder) :].count(os.sep) >= depth:
            names[:] = []
        if "latest_checkpointed_iteration.txt" not in files:
            continue
        names[:] = []
        try:
            kind, entry = _checkpoint(path)
        except PermissionError as error:
            note(error)
            continue
        except (OSError, ValueError, RecursionError):
            continue
        found = adapters if kind == "adapter" else bases
        if len(found) < MAX_ENTRIES:
            found.append(entry)
    return bases, adapters


def _checkpoint(path: str) -> tuple[Any, dict[str, Any]]:
    """Return the kind and the entry of the checkpoint in a folder.

    Raises:
        OSError, ValueError, RecursionError: the marker or the record cannot be read, or is not in its form.
    """
    iteration = int(_text(os.path.join(path, "latest_checkpointed_iteration.txt"), MAX_MARKER_BYTES))
    if not 0 <= iteration <= MAX_NUMBER:
        raise ValueError("an iteration that no training reaches")
    record = _record(path, iteration)
    base = _object(record.get("base"))
    fingerprint = record.get("fingerprint") or base.get("fingerprint")
    if not isinstance(fingerprint, (str, type(None))):
        raise ValueError("a fingerprint that is not text")
    architecture = _object(record.get("architecture"))
    if not all(_is_plain(value) for value in architecture.values()):
        raise ValueError("an architecture that is not made of plain values")
    entry = {"path": path, "iteration": iteration, "architecture": architecture, "fingerprint": fingerprint}
    return record.get("kind"), entry


def _record(path: str, iteration: int) -> dict[str, Any]:
    for file in (
        os.path.join(path, f"iter_{iteration:07}", "mixtral_run.json"),
        os.path.join(path, "mixtral_run.json"),
    ):
        if os.path.exists(file):
            return _object(json.loads(_text(file, MAX_RECORD_BYTES)))
    return {}


def _text(path: str, max_bytes: int) -> str:
    """Return the text of a regular file of at most `max_bytes`. Raises OSError or ValueError for anything else.

    Pipes and devices are not opened. O_NONBLOCK and the second check hold if the file is replaced in between.
    """
    if not os.path.isfile(path):
        raise ValueError("not a regular file")
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError("the file is too long")
    return data.decode("utf-8")


def _object(value: Any) -> dict[str, Any]:
    """Return a JSON object; {} for null or another empty value. Raises ValueError for anything else."""
    if value and not isinstance(value, dict):
        raise ValueError("not an object")
    return value or {}


def _is_plain(value: Any) -> bool:
    """Return True for text, null, a flag, a finite number of common size, or a list of these without further lists."""
    if isinstance(value, list):
        return not any(isinstance(each, list) for each in value) and all(_is_plain(each) for each in value)
    if isinstance(value, (int, float)):
        return abs(value) <= MAX_NUMBER  # False for NaN
    return value is None or isinstance(value, str)


def jobs() -> list[dict[str, str]]:
    """Return the running jobs that the kit started on this host."""
    row = '{{.Names}}\t{{.State}}\t{{.RunningFor}}\t{{.Label "org.mixtral-run.verb"}}'
    answer = _run("docker", "ps", "--filter", f"label={LABEL_JOB}", "--format", row)
    rows = [line.split("\t") for line in answer.out.splitlines()]
    return [dict(zip(("name", "state", "since", "verb"), cells)) for cells in rows if len(cells) == 4]  # noqa: B905


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def main() -> None:
    """Print the status as one JSON object. The only argument is a JSON object of options."""
    json.dump(read_status(json.loads(sys.argv[1])), sys.stdout)


if __name__ == "__main__":
    main()
