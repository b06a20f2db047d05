"""Program that runs on a host: reads the state of the host and prints it as one JSON object.

It is sent over SSH to `python3 -` and installs nothing. It imports only the standard library of Python 3.8 and the
modules of plugins/module_utils/mixtral_run_host that are sent along. Every reading has a time limit, so that a hanging
driver does not block it. It changes nothing.
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any

LABEL_JOB = "org.mixtral-run.job"


def read_status(folders: dict[str, str]) -> dict[str, Any]:
    """Return all readings. `folders`: the checkpoints folder, the HF cache and the image name on this host."""
    from ansible.module_utils.mixtral_run_host import probe  # type: ignore[import-untyped]

    found: dict[str, Any] = probe.host([folders["checkpoints"], folders["hf_home"], "/"])
    found["hostname"] = os.uname().nodename
    found["xid_errors"] = xid_errors()
    found["swap_used_gib"] = swap_used_gib()
    found["image"] = image(folders["image"])
    found["models"] = cached_models(folders["hf_home"])
    found["checkpoints"], found["adapters"] = checkpoints(folders["checkpoints"])
    found["jobs"] = jobs()
    found["root"] = os.geteuid() == 0
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
    return found


def checkpoints(folder: str, depth: int = 3) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the converted checkpoints and the adapters below a folder that have the marker of a complete one."""
    bases: list[dict[str, Any]] = []
    adapters: list[dict[str, Any]] = []
    for path, names, files in os.walk(folder):
        if path[len(folder) :].count(os.sep) >= depth:
            names[:] = []
        if "latest_checkpointed_iteration.txt" not in files:
            continue
        names[:] = []
        try:
            with open(os.path.join(path, "latest_checkpointed_iteration.txt"), encoding="utf-8") as file:
                iteration = int(file.read().strip())
            record = _record(path, iteration)
        except (OSError, ValueError):
            continue
        entry = {"path": path, "iteration": iteration, "architecture": record.get("architecture") or {}}
        entry["fingerprint"] = record.get("fingerprint") or (record.get("base") or {}).get("fingerprint")
        (adapters if record.get("kind") == "adapter" else bases).append(entry)
    return bases, adapters


def _record(path: str, iteration: int) -> dict[str, Any]:
    for file in (
        os.path.join(path, f"iter_{iteration:07}", "mixtral_run.json"),
        os.path.join(path, "mixtral_run.json"),
    ):
        if os.path.exists(file):
            with open(file, encoding="utf-8") as stream:
                record: dict[str, Any] = json.load(stream)
                return record
    return {}


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
