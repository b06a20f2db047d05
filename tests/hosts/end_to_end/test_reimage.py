"""A job outlives a kill and a power cut of its host; after a reimage one command sets the host up again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.shell import call
from tests.hosts.end_to_end.fleet import (
    CHECKPOINTS,
    JOB,
    LAYOUT,
    NAMES,
    POINTS,
    SETTINGS,
    Fleet,
    Operator,
    changed_hosts,
)

pytestmark = pytest.mark.timeout(1800)


SURVIVOR = (
    "--load", "base", "--mock-data", "--save-interval", "5", "--no-report", *LAYOUT[:-1], "60",
)  # fmt: skip


@pytest.fixture(scope="package")
def undisturbed(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> list[float]:
    """Return the losses of a run that nothing happens to."""
    operator.run("finetune", "--on", set_up(NAMES[1]), *JOB, *SURVIVOR, "--save", "undisturbed")
    return losses(fleet.hosts[NAMES[1]], "undisturbed")


@pytest.fixture(scope="package")
def disk(operator: Operator, fleet: Fleet, undisturbed: list[float]) -> Path:
    """Return the second host's checkpoints folder after a job there was killed and its host's power cut, twice."""
    name, folder = NAMES[1], operator.folder / "disk"
    words = ("--save", "survivor", "--max-restarts", "3", "--detach")
    started = operator.run("finetune", "--on", fleet.target(name), *JOB, *SURVIVOR, *words)
    (job,) = re.findall(r"^(finetune-\S+) runs on", started, re.MULTILINE)
    wait_for_iteration(fleet.hosts[name], 10)
    fleet.hosts[name].shell(f"kill -9 $(docker inspect --format '{{{{.State.Pid}}}}' {job})")
    wait_for_iteration(fleet.hosts[name], 25)
    call("docker", "kill", targets.container_name(name))
    fleet.boot(name)
    wait_for_iteration(fleet.hosts[name], 40)
    call("docker", "kill", targets.container_name(name))
    call("docker", "cp", "--archive", f"{targets.container_name(name)}:{CHECKPOINTS}", folder)
    fleet.boot(name)
    state = f"~{targets.USER}/.local/state/mixtral-run/jobs/{job}/state/attempts.json"
    assert json.loads(fleet.hosts[name].shell(f"cat {state}"))["count"] >= 3
    fleet.hosts[name].run("docker", "rm", "--force", job)
    return folder


def losses(host: targets.Host, save: str) -> list[float]:
    """Return the loss of each iteration of a run."""
    lines = map(json.loads, host.run("cat", f"{CHECKPOINTS}/{save}/metrics.jsonl").splitlines())
    return [line["loss"] for line in lines]


def wait_for_iteration(host: targets.Host, number: int) -> None:
    """Wait until the job has come so far, and has saved."""
    until = time.monotonic() + 300
    script = f"cd {CHECKPOINTS}/survivor && tail -n 1 metrics.jsonl && cat latest_checkpointed_iteration.txt"
    while True:
        found = re.search(r'"iteration": (\d+).*\n\d+', host.shell(script, check=False))
        if found and int(found[1]) >= number:
            return
        assert time.monotonic() < until, host.shell("docker ps --all; docker logs $(docker ps -lq)", check=False)
        time.sleep(0.2)


def test_a_job_comes_back_after_a_kill_and_a_power_cut(disk: Path, undisturbed: list[float]) -> None:
    """The engine starts its container again, and the job continues from its newest checkpoint."""
    found = [json.loads(line) for line in (disk / "survivor/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in found] == list(range(1, len(found) + 1)) and len(found) >= 40
    assert [line["loss"] for line in found] == undisturbed[: len(found)]


def test_after_a_reimage_one_host_changes_and_the_other_does_not(
    operator: Operator, fleet: Fleet, set_up: Callable[[str], str]
) -> None:
    first, second = NAMES
    page = operator.folder / "status.html"
    operator.run("status", *map(fleet.target, NAMES), "--html", str(page), "--checkpoints-folder", CHECKPOINTS)
    for word in (
        *(fleet.target(name).split("@")[1] for name in NAMES),
        f"{CHECKPOINTS}/base",
        f"{CHECKPOINTS}/adapter ",
    ):
        assert word in page.read_text()
    # The host has the same name, a new key, an empty disk, and a new port, which the engine assigns to each container.
    fleet.install(second)
    moved = fleet.target(second)
    words = ("bootstrap", fleet.target(first), moved, *SETTINGS)
    for point in POINTS:
        operator.kill(point, "bootstrap", moved, *SETTINGS)
    changed = changed_hosts(operator.run(*words))
    assert changed[fleet.target(first).split("@")[1]] == 0
    assert changed[moved.split("@")[1]] > 0
    statuses = json.loads(operator.run("status", fleet.target(first), moved, "--json"))
    assert [status["reimaged"] for status in statuses] == [False, False]
    assert [bool(status["image"]) for status in statuses] == [True, True]
    assert [bool(status["set_up"]) for status in statuses] == [True, True]
