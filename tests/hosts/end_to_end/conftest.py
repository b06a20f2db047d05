"""From two bare hosts to an adapter on this machine, by the command line, over real SSH, on throw-away hosts.

Only the GPUs are missing: jobs run on the CPU, at the size of the rehearsal. One host builds the image, and the other
loads it from an archive. The build finds all packages in its base image, because installing torch from wheels takes
minutes: kit_image.dependencies does that, by the same Dockerfile, from the same wheels, where they changed. Files of
tests are run in their order: the later ones take the hosts apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.__main__ import variables
from mixtral_run.fleet.testhosts.image import ssh_key
from mixtral_run.fleet.testhosts.kit_image import (
    ARCHIVE_NAME,
    LAYERS_ON_HOST,
    LIGHT,
    dependencies,
    fill_wheelhouse,
    image_archive,
)
from mixtral_run.fleet.testhosts.shell import call
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import PLAN, tokenizer_texts, write_rehearsal_examples
from tests.hosts.end_to_end.fleet import (
    JOB,
    LAYOUT,
    MODELS,
    NAMES,
    SETTINGS,
    TOKEN,
    Fleet,
    Operator,
    changed_hosts,
)


@pytest.fixture(scope="package")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "home").mkdir()
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(folder / "agent")], stdout=subprocess.DEVNULL)
    environment = {
        **os.environ, "HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "state"),
        "SSH_AUTH_SOCK": str(folder / "agent"), "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    while subprocess.run(
        ["ssh-add", "-q", str(ssh_key())], env=environment, capture_output=True, check=False
    ).returncode:
        assert agent.poll() is None
        time.sleep(0.1)
    (folder / "token").write_text(TOKEN + "\n")
    write_random_mixtral(
        folder / "hf-model", architecture=PLAN.architecture, dtype=PLAN.dtype, seed=PLAN.seed, texts=tokenizer_texts(),
        num_shards=2, initializer_range=PLAN.initializer_range,
    )  # fmt: skip
    for file in (folder / "hf-model").iterdir():
        file.chmod(0o644)
    write_rehearsal_examples(folder / "my pairs.jsonl")
    yield Operator(folder, environment)
    agent.terminate()
    agent.wait()


@pytest.fixture(scope="package")
def fleet(docker_engine: None, operator: Operator) -> Iterator[Fleet]:
    fill_wheelhouse(LIGHT)
    image_archive()
    fleet = Fleet()
    for name in NAMES:
        call("docker", "volume", "rm", "--force", fleet.data_disk(name), check=False)  # what a killed run left
        fleet.install(name)
    settings = {
        **variables(), "preflight_num_gpus": 0,
        # The second host's port changes when it is reimaged.
        "image_source": f"{{{{ 'build' if ansible_port == {fleet.hosts[NAMES[0]].port} else 'archive' }}}}",
        "image_base_image": dependencies(),
        "image_archive": LAYERS_ON_HOST, "image_archive_on_host": True, "image_archive_name": ARCHIVE_NAME,
    }  # fmt: skip
    del settings["image_requirements"]  # the complete image, because every verb runs in it
    (operator.folder / "variables.json").write_text(json.dumps(settings))
    yield fleet
    for name in NAMES:
        targets.remove(name)
        call("docker", "volume", "rm", "--force", fleet.data_disk(name))


@pytest.fixture(scope="package")
def bootstrapped(operator: Operator, fleet: Fleet) -> dict[str, int]:
    """Bootstrap both bare hosts and return the number of changes per host."""
    return changed_hosts(operator.run("bootstrap", *map(fleet.target, NAMES), *SETTINGS))


def put_model(operator: Operator, name: str) -> None:
    """Put the HF model into the folder of models on a host."""
    container = targets.container_name(name)
    call("docker", "exec", container, "mkdir", "-p", MODELS)
    call("docker", "cp", "--quiet", operator.folder / "hf-model", f"{container}:{MODELS}/tiny")


@pytest.fixture(scope="package")
def up(operator: Operator, fleet: Fleet, bootstrapped: dict[str, int]) -> Callable[..., str]:
    """Return a function that calls `up` for the first host with further arguments.

    The first call finds the host set up, with the model's weights.
    """
    put_model(operator, NAMES[0])
    words = (
        "up", fleet.target(NAMES[0]), *JOB, *SETTINGS, "--hf-model-path", f"{MODELS}/tiny", "--load", "base",
        "--save", "adapter", "--output-path", "my adapter", *LAYOUT,
    )  # fmt: skip
    return lambda *more, code=0: operator.run(*words, *more, code=code)


@pytest.fixture(scope="package")
def brought_up(up: Callable[..., str]) -> str:
    """Return the output of the first `up`."""
    return up("--data-path", "my pairs.jsonl")


@pytest.fixture(scope="package")
def set_up(operator: Operator, fleet: Fleet, brought_up: str) -> Callable[[str], str]:
    """Return a function that gives a host's name for --on. Both hosts have a converted model, the first an adapter.

    `up` has converted on the first host; `convert --on` converts on the second.
    """
    put_model(operator, NAMES[1])
    words = ("--hf-model-path", f"{MODELS}/tiny", "--output-path", "base", *LAYOUT[:4])
    operator.run("convert", "--on", fleet.target(NAMES[1]), *JOB, *words)
    return fleet.target
