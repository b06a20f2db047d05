"""A job outlives a kill, a power cut and a reimage of its host; one command sets the host up again."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.kit_image import ARCHIVE_ON_HOST, image_archive
from mixtral_run.fleet.testhosts.shell import call
from tests.hosts.end_to_end.fleet import (
    CHECKPOINTS,
    IMAGE,
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


DATA = targets.DATA_DISK
SURVIVOR = (
    "--load", f"{DATA}/base", "--mock-data", "--save-interval", "5", "--no-report", *LAYOUT[:-1], "60",
)  # fmt: skip


@pytest.fixture(scope="package")
def undisturbed(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> list[float]:
    """Return the losses of a run that nothing happens to. The base is on the second host's data disk from here on."""
    target, host = set_up(NAMES[1]), fleet.hosts[NAMES[1]]
    host.shell(f"cp -a {CHECKPOINTS}/base {DATA} && chown {targets.USER} {DATA} && chmod 2775 {DATA}")
    operator.run("finetune", "--on", target, *JOB, *SURVIVOR, "--save", f"{DATA}/undisturbed")
    return losses(host, "undisturbed")


@pytest.fixture(scope="package")
def cut_off(operator: Operator, fleet: Fleet, undisturbed: list[float]) -> list[float]:
    """Return the losses so far of a job that was killed, and whose host's power was cut twice: it is off now."""
    name = NAMES[1]
    words = ("--save", f"{DATA}/survivor", "--max-restarts", "3", "--detach")
    started = operator.run("finetune", "--on", fleet.target(name), *JOB, *SURVIVOR, *words)
    (job,) = re.findall(r"^(finetune-\S+) runs on", started, re.MULTILINE)
    wait_for_iteration(fleet.hosts[name], 10)
    fleet.hosts[name].shell(f"kill -9 $(docker inspect --format '{{{{.State.Pid}}}}' {job})")
    wait_for_iteration(fleet.hosts[name], 25)
    call("docker", "kill", targets.container_name(name))
    fleet.boot(name)
    wait_for_iteration(fleet.hosts[name], 40)
    state = f"~{targets.USER}/.local/state/mixtral-run/jobs/{job}/state/attempts.json"
    assert json.loads(fleet.hosts[name].shell(f"cat {state}"))["count"] >= 3
    found = losses(fleet.hosts[name], "survivor")
    call("docker", "kill", targets.container_name(name))
    return found


def losses(host: targets.Host, save: str) -> list[float]:
    """Return the loss of each iteration of a run."""
    text = host.run("cat", f"{DATA}/{save}/metrics.jsonl")
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def wait_for_iteration(host: targets.Host, number: int) -> None:
    """Wait until the job has come so far, and has saved. The host itself looks: a call of the engine costs more."""
    script = f"""
        for attempt in $(seq 1500); do
            cd {DATA}/survivor && [ -s latest_checkpointed_iteration.txt ] && last=$(tail -n 1 metrics.jsonl) &&
                [ "$(expr "$last" : '.*"iteration": \\([0-9]*\\)')" -ge {number} ] && exit
            sleep 0.2
        done 2>/dev/null
        docker ps --all; docker logs $(docker ps -lq); exit 1"""
    host.shell(script)


def test_a_job_comes_back_after_a_kill_and_a_power_cut(cut_off: list[float], undisturbed: list[float]) -> None:
    """The engine starts its container again, and the job continues from its newest checkpoint."""
    assert len(undisturbed) == 60 and len(cut_off) >= 40
    assert cut_off == undisturbed[: len(cut_off)]


def image_in(archive: Path) -> list[str]:
    """Return the ID of the image in an archive and its number of layers. The ID covers the hashes of all layers."""
    with tarfile.open(archive) as saved:
        manifest = saved.extractfile("manifest.json")
        assert manifest is not None
        (image,) = json.load(manifest)
    return [f"sha256:{Path(image['Config']).stem}", str(len(image["Layers"]))]


def test_after_a_reimage_one_host_changes_and_the_job_ends_as_if_nothing_had_happened(
    operator: Operator, fleet: Fleet, cut_off: list[float], undisturbed: list[float]
) -> None:
    first, second = NAMES
    fleet.boot(second)
    fleet.hosts[second].shell("docker rm --force $(docker ps --all --quiet)")
    page = operator.folder / "status.html"
    operator.run("status", *map(fleet.target, NAMES), "--html", str(page))
    for word in (
        *(fleet.target(name).split("@")[1] for name in NAMES),
        f"{CHECKPOINTS}/base",
        f"{CHECKPOINTS}/adapter ",
    ):
        assert word in page.read_text()
    # The host has the same name, a new key, an empty disk, and a new port, which the engine assigns to each container.
    # The archive is 1.9 GB with all layers now; at first the host's disk had all but the kit's.
    fleet.install(second, with_layers=False)
    variables = operator.folder / "variables.json"
    variables.write_text(json.dumps(json.loads(variables.read_text()) | {"image_archive": ARCHIVE_ON_HOST}))
    moved = fleet.target(second)
    words = ("bootstrap", fleet.target(first), moved, *SETTINGS)
    for point in POINTS:
        operator.kill(point, "bootstrap", moved, *SETTINGS)
    changed = changed_hosts(operator.run(*words))
    assert changed[fleet.target(first).split("@")[1]] == 0
    assert changed[moved.split("@")[1]] > 0
    inspect = ("docker", "image", "inspect", IMAGE, "--format", "{{.Id}} {{len .RootFS.Layers}}")
    assert fleet.hosts[second].run(*inspect).split() == image_in(image_archive())
    statuses = json.loads(operator.run("status", fleet.target(first), moved, "--json"))
    assert [status["reimaged"] for status in statuses] == [False, False]
    assert [bool(status["image"]) for status in statuses] == [True, True]
    assert [bool(status["set_up"]) for status in statuses] == [True, True]
    # The checkpoints are on the data disk: the same command as before takes the job up again, to the same losses.
    output = operator.run("finetune", "--on", moved, *JOB, *SURVIVOR, "--save", f"{DATA}/survivor", "--resume", "auto")
    resumed = re.search(r"Resuming from \S+, iteration (\d+)", output)
    assert resumed is not None and int(resumed[1]) >= 30
    assert losses(fleet.hosts[second], "survivor") == undisturbed
