"""STAND-IN for kubectl and a cluster behind it: no API server can run in the tests.

A program `kubectl` on PATH that takes the words and flags that kubectl 1.37 has and refuses all others, as kubectl
does. It answers from a folder: `steps.json` has what `get` sees at each call, `logs/POD` the output of a pod.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FLAGS = {
    "apply": {"--server-side": False, "--field-manager": True, "--validate": True, "--filename": True},
    "get": {"--selector": True, "--output": True},
    "logs": {
        "--container": True, "--follow": False, "--timestamps": False, "--since-time": True, "--tail": True,
    },
    "delete": {
        "--selector": True, "--cascade": True, "--wait": True, "--timeout": True, "--ignore-not-found": False,
    },
    "wait": {"--for": True, "--timeout": True},
    "exec": {"--container": True},
    "config": {"--minify": False, "--output": True},
}  # fmt: skip
"""Flags of each word that the kit uses, and whether a value follows."""
GLOBAL = {"--context": True, "--namespace": True}


def install(folder: Path) -> Path:
    """Write the program into `folder`/bin and return that folder."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    (folder / "logs").mkdir()
    program = programs / "kubectl"
    program.write_text(f"#!{sys.executable} -S\nimport runpy, sys\nsys.argv[1:1] = [{str(folder)!r}]\n"
                       f"runpy.run_path({str(Path(__file__))!r}, run_name='__main__')\n")  # fmt: skip
    program.chmod(0o755)
    return programs


def parse(words: list[str]) -> tuple[str, list[str], dict[str, str]]:
    """Return the word, its arguments and its flags. Exits as kubectl does for what it does not know."""
    flags: dict[str, str] = {}
    plain: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":
            plain += rest
            break
        if not word.startswith("--"):
            plain.append(word)
            continue
        name, equals, value = word.partition("=")
        known = {**GLOBAL, **FLAGS.get(plain[0] if plain else "", {})}
        if name not in known:
            sys.exit(f"error: unknown flag: {name}")
        if known[name] and not equals:
            value = rest.pop(0)
        flags[name] = value or "true"
    return plain[0], plain[1:], flags


def main(folder: Path, words: list[str]) -> None:
    with (folder / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    word, arguments, flags = parse(words)
    settings = json.loads((folder / "settings.json").read_text())
    if word in settings.get("refused", {}):
        sys.exit(settings["refused"][word])
    {
        "apply": apply,
        "get": get,
        "wait": lambda *_: None,
        "exec": run_here,
        "logs": logs,
        "delete": delete,
        "config": config,
    }[word](folder, arguments, flags)


def apply(folder: Path, _: list[str], flags: dict[str, str]) -> None:
    assert flags["--filename"] == "-"
    number = len(list(folder.glob("applied-*.yaml")))
    (folder / f"applied-{number}.yaml").write_text(sys.stdin.read())
    print("job.batch/x serverside-applied")


def get(folder: Path, arguments: list[str], flags: dict[str, str]) -> None:
    if flags["--output"].startswith("jsonpath"):
        print("5f0f63a4-0000-4000-8000-000000000000", end="")
        return
    steps = json.loads((folder / "steps.json").read_text())
    name = flags["--selector"].partition("=")[2]
    print(json.dumps({"kind": "List", "items": steps[0]}).replace("NAME", name))
    if len(steps) > 1 and not (folder / "steps.stay").exists():
        replace(folder / "steps.json", json.dumps(steps[1:]))


def replace(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def logs(folder: Path, arguments: list[str], flags: dict[str, str]) -> None:
    path = folder / "logs" / arguments[0]
    if not path.exists():
        sys.exit(f'Error from server (NotFound): pods "{arguments[0]}" not found')
    lines: list[str] = path.read_text().splitlines()
    if "--since-time" in flags:
        # The API has whole seconds.
        lines = [line for line in lines if line[:19] >= flags["--since-time"][:19]]
    if "--tail" in flags:
        lines = lines[len(lines) - min(len(lines), int(flags["--tail"])) :]
    lost = folder / "logs" / f"{arguments[0]}.lost"
    if "--follow" in flags and lost.exists():
        lines = lines[: int(lost.read_text())]
        lost.unlink()
    for line in lines:
        print(line if "--timestamps" in flags else line.partition(" ")[2])


def delete(folder: Path, arguments: list[str], flags: dict[str, str]) -> None:
    if arguments[0].startswith("job") and "--selector" not in flags:
        (folder / "steps.stay").unlink(missing_ok=True)
    print("deleted")


def run_here(folder: Path, arguments: list[str], flags: dict[str, str]) -> None:
    # The volumes of every pod are a folder of this machine.
    os.chdir(folder / "volumes")
    words = [word.replace("/checkpoints", str(folder / "volumes/checkpoints")) for word in arguments[1:]]
    os.execvp(words[0], words)


def config(folder: Path, arguments: list[str], flags: dict[str, str]) -> None:
    print({"current-context": "here", "view": "training"}[arguments[0]])


def job(status: dict[str, Any] | None = None, kind: str = "Job", **spec: Any) -> dict[str, Any]:
    """Return a Job as the API describes it, in the fields that the kit reads. NAME is the name that was asked for."""
    labels = {"org.mixtral-run.job": "NAME"}
    return {"kind": kind, "metadata": {"name": "NAME", "labels": labels}, "spec": spec, "status": status or {}}


def ended(kind: str, reason: str = "", message: str = "") -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True", "reason": reason, "message": message}]}


def pod(name: str, phase: str, index: int = 0, code: int | None = None, **more: Any) -> dict[str, Any]:
    """Return a pod of a Job as the API describes it. more: finished, reason, created, unscheduled."""
    status: dict[str, Any] = {"phase": phase}
    if code is not None:
        finished = more.get("finished", "2026-01-01T00:10:00Z")
        ending = {"exitCode": code, "finishedAt": finished, "reason": more.get("reason", "Error")}
        status["containerStatuses"] = [{"name": "trainer", "state": {"terminated": ending}}]
    if "unscheduled" in more:
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": more["unscheduled"],
        }
        status["conditions"] = [condition]
    labels = {"org.mixtral-run.job": "NAME", "batch.kubernetes.io/job-completion-index": str(index)}
    created = more.get("created", "2026-01-01T00:00:00Z")
    metadata = {"name": name, "labels": labels, "creationTimestamp": created}
    return {"kind": "Pod", "metadata": metadata, "spec": {"nodeName": f"node-{index}"}, "status": status}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
