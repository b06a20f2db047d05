"""From two bare hosts to an adapter on this machine, by the command line, over real SSH, on throw-away hosts.

Only the GPUs are missing: jobs run on the CPU, at the size of the rehearsal. One host builds the image from wheels, and
the other loads it from an archive.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pexpect
import pytest

from mixtral_run.fleet.testhosts import hosts as targets
from mixtral_run.fleet.testhosts.__main__ import variables
from mixtral_run.fleet.testhosts.disks import with_images
from mixtral_run.fleet.testhosts.image import ssh_key
from mixtral_run.fleet.testhosts.kit_image import ARCHIVE_NAME, LAYERS_ON_HOST, fill_wheelhouse, image_archive
from mixtral_run.fleet.testhosts.shell import call
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import PLAN, tokenizer_texts, write_rehearsal_examples
from tests.hosts.conftest import seen_arguments
from tests.hosts.snapshot import difference, snapshot
from tests.support.processes.killed import killed_at
from tests.support.servers.hub_server import COMMIT, NAME, serving

# The first test includes the time to build the image and to start both hosts.
pytestmark = pytest.mark.timeout(1800)

NAMES = ("fleet-one", "fleet-two")
IMAGE = "mixtral-run:local"
CHECKPOINTS, MODELS = "/srv/checkpoints", "/srv/models"
TOKEN = "hf_endToEndTokenThatMustNotLeak"
POINTS = ("docker · Install Docker Engine", "nvidia_container_toolkit · Install the NVIDIA container toolkit")
"""Lines of a bootstrap after which it is killed: one role is half done, then another. The long form has random points:
benchmarks/killed_bootstrap.py."""
SETTINGS = ("-e", "@variables.json", "--hf-token-file", "token")
JOB = ("--checkpoints-folder", CHECKPOINTS, "--shm-size", "1g", "--ulimit", "none")
LAYOUT = (
    "--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--micro-batch-size", "1",
    "--global-batch-size", "8", "--seq-length", "48", "--train-iters", "4",
)  # fmt: skip


@dataclass
class Operator:
    """Laptop of an operator: its state folder and agent, and the command line that runs there."""

    folder: Path
    environment: dict[str, str]

    def call(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run mixtral-run and check its exit code."""
        argv = [sys.executable, "-m", "mixtral_run", *words]
        done = subprocess.run(
            argv, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == code, (done.stdout + done.stderr)[-6000:]
        return done

    def run(self, *words: str, code: int = 0) -> str:
        """Run mixtral-run, check its exit code, and return all its output."""
        done = self.call(*words, code=code)
        return done.stdout + done.stderr

    def kill(self, text: str, *words: str) -> None:
        """Run mixtral-run and kill it, with all that it started on this machine, once it prints `text`."""
        argv = [sys.executable, "-m", "mixtral_run", *words]
        assert killed_at(text, argv, self.folder, self.environment)


@dataclass
class Fleet:
    """Current throw-away hosts by name."""

    hosts: dict[str, targets.Host] = field(default_factory=dict)
    bare: dict[str, set[str]] = field(default_factory=dict)
    """Packages and files of the second host before anything was done to it."""

    def install(self, name: str) -> None:
        """Install a host anew. Its disk holds the base image of builds, so that no registry is needed."""
        self.hosts[name] = targets.reimage(name, disk=with_images("bookworm"))
        if name == NAMES[1]:
            self.bare[name] = snapshot(self.hosts[name])

    def target(self, name: str) -> str:
        return f"{targets.USER}@127.0.0.1:{self.hosts[name].port}"


@pytest.fixture(scope="module")
def operator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    folder = tmp_path_factory.mktemp("laptop")
    (folder / "home").mkdir()
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(folder / "agent")], stdout=subprocess.DEVNULL)
    environment = {
        **os.environ, "HOME": str(folder / "home"), "XDG_STATE_HOME": str(folder / "state"),
        "SSH_AUTH_SOCK": str(folder / "agent"), "PYTHONPATH": str(Path(__file__).parents[2]),
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


@pytest.fixture(scope="module")
def fleet(docker_engine: None, operator: Operator) -> Iterator[Fleet]:
    fill_wheelhouse()
    image_archive()
    fleet = Fleet()
    for name in NAMES:
        fleet.install(name)
    settings = {
        **variables(), "preflight_num_gpus": 0,
        # The second host's port changes when it is reimaged.
        "image_source": f"{{{{ 'build' if ansible_port == {fleet.hosts[NAMES[0]].port} else 'archive' }}}}",
        "image_wheelhouse": f"{targets.SHOWN_CACHE}/wheelhouse",
        "image_archive": LAYERS_ON_HOST, "image_archive_on_host": True, "image_archive_name": ARCHIVE_NAME,
    }  # fmt: skip
    del settings["image_requirements"]  # the complete image, because every verb runs in it
    (operator.folder / "variables.json").write_text(json.dumps(settings))
    yield fleet
    for name in NAMES:
        targets.remove(name)


def changed_hosts(output: str) -> dict[str, int]:
    """Return the number of changes per host, from the table at the end of a bootstrap."""
    rows = re.findall(r"^✓ (\S+)\s+done\s+(\d+)\s+\d+", output, re.MULTILINE)
    return {name: int(changed) for name, changed in rows}


@pytest.fixture(scope="module")
def bootstrapped(operator: Operator, fleet: Fleet) -> dict[str, int]:
    """Bootstrap both bare hosts and return the number of changes per host."""
    return changed_hosts(operator.run("bootstrap", *map(fleet.target, NAMES), *SETTINGS))


@pytest.fixture(scope="module")
def up(operator: Operator, fleet: Fleet, bootstrapped: dict[str, int]) -> Callable[..., str]:
    """Return a function that calls `up` for the first host with further arguments.

    The first call finds the host set up, with the model's weights.
    """
    container = targets.container_name(NAMES[0])
    call("docker", "exec", container, "mkdir", "-p", MODELS)
    call("docker", "cp", "--quiet", operator.folder / "hf-model", f"{container}:{MODELS}/tiny")
    words = (
        "up", fleet.target(NAMES[0]), *JOB, *SETTINGS, "--hf-model-path", f"{MODELS}/tiny", "--load", "base",
        "--save", "adapter", "--output-path", "my adapter", *LAYOUT,
    )  # fmt: skip
    return lambda *more, code=0: operator.run(*words, *more, code=code)


@pytest.fixture(scope="module")
def brought_up(up: Callable[..., str]) -> str:
    """Return the output of the first `up`."""
    return up("--data-path", "my pairs.jsonl")


@pytest.fixture(scope="module")
def set_up(operator: Operator, fleet: Fleet, brought_up: str) -> Callable[[str], str]:
    """Return a function that gives a host's name for --on. Both hosts have a converted model, the first an adapter."""
    container = targets.container_name(NAMES[1])
    call("docker", "cp", "--quiet", operator.folder / "hf-model", f"{container}:{CHECKPOINTS}/hf-model")
    convert = ("--hf-model-path", f"{CHECKPOINTS}/hf-model", "--output-path", "base", *LAYOUT[:4])
    operator.run("convert", "--on", fleet.target(NAMES[1]), *JOB, *convert)
    return fleet.target


def test_check_tells_what_it_would_do_and_leaves_bare_hosts_as_they_are(operator: Operator, fleet: Fleet) -> None:
    said = operator.run("bootstrap", *map(fleet.target, NAMES), *SETTINGS, "--check", "--diff")
    assert "would change" in said
    assert "± " in said and "daemon.json" in said
    would_change = changed_hosts(said)
    for name, host in fleet.hosts.items():
        assert would_change[fleet.target(name).split("@")[1]] > 0
        assert host.shell("command -v docker; ls /var/lib/mixtral-run", check=False) == ""


def test_two_bare_hosts_are_set_up_by_one_command(fleet: Fleet, bootstrapped: dict[str, int]) -> None:
    assert set(bootstrapped) == {fleet.target(name).split("@")[1] for name in NAMES}
    assert min(bootstrapped.values()) > 0
    # An image that was loaded or pulled from a registry has no such label.
    label = '{{ with .Config.Labels }}{{ index . "org.mixtral-run.inputs" }}{{ end }}'
    labels = [host.run("docker", "image", "inspect", IMAGE, "--format", label).strip() for host in fleet.hosts.values()]
    assert [len(each) for each in labels] == [64, 0]


def test_up_makes_an_adapter(operator: Operator, fleet: Fleet, brought_up: str) -> None:
    assert changed_hosts(brought_up) == {fleet.target(NAMES[0]).split("@")[1]: 0}
    for word in (f"Convert {MODELS}/tiny → base", "Finetune → adapter", "iteration 4/4", "Export → adapter-peft"):
        assert word in brought_up
    assert (operator.folder / "my adapter/adapter_config.json").is_file()
    assert "fleet" not in operator.run("jobs", "--running")


def test_up_again_does_nothing(operator: Operator, up: Callable[..., str], brought_up: str) -> None:
    again = up("--data-path", "my pairs.jsonl")
    assert "Convert: base exists" in again
    assert "Finetune: adapter is at iteration 4" in again
    assert "Export: adapter-peft exists" in again
    assert "iteration" not in again.replace("at iteration 4", "")
    (operator.folder / "other.jsonl").write_text('{"instruction": "Who?", "response": "Me."}\n')
    assert "trained on another file than other.jsonl" in up("--data-path", "other.jsonl", code=2)


def test_the_adapter_answers_in_json(operator: Operator, set_up: Callable[[str], str]) -> None:
    instruction = 'Say "it\'s $(one)".'
    done = operator.call(
        "generate", "--on", set_up(NAMES[0]), *JOB, "--load", "base", "--adapter", "adapter",
        "--instruction", instruction, "--max-new-tokens", "4", "--json", *LAYOUT[:4],
    )  # fmt: skip
    (answer,) = json.loads(done.stdout)
    assert answer["prompt"] == instruction
    assert 1 <= answer["num_tokens"] <= 4
    assert "Loaded /checkpoints/base with /checkpoints/adapter" in done.stderr


def test_the_smoke_test_runs_there_and_its_report_is_fetched(operator: Operator, set_up: Callable[[str], str]) -> None:
    on = ("--on", set_up(NAMES[0]))
    output = operator.run(
        "smoke", *on, *JOB, "--load", "base", "--work-path", "smoke", *LAYOUT[:4],
        "--train-iters", "2", "--seq-length", "48", "--global-batch-size", "2",
    )  # fmt: skip
    assert "already done" in output
    assert "Smoke test passed" in output
    operator.run("fetch", "smoke-", *on)
    report = json.loads((operator.folder / "smoke/report.json").read_text())
    assert report["passed"] is True


def test_two_hosts_train_one_job(operator: Operator, set_up: Callable[[str], str]) -> None:
    both = ",".join(set_up(name) for name in NAMES)
    words = ("--load", "base", "--mock-data", "--nproc-per-node", "1", "--nccl-timeout", "600", *LAYOUT)
    output = operator.run("pretrain", "--on", both, *JOB, *words)
    assert re.search(r"127\.0\.0\.1:\d+ \| .*iteration 4/4", output)
    assert "2 × cpu" in output


def test_the_images_hf_downloads_the_model(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    host = fleet.hosts[NAMES[0]]
    gateway = host.shell("ip route show default").split()[2]  # this machine's address as seen from the host
    with serving(operator.folder / "hf-model", "0.0.0.0") as hub:
        model = {"hf_cache_model": NAME, "hf_cache_endpoint": f"http://{gateway}:{hub.server_address[1]}"}
        words = ("bootstrap", set_up(NAMES[0]), *SETTINGS, "--tags", "hf_cache", "-e", json.dumps(model))
        assert min(changed_hosts(operator.run(*words)).values()) > 0
        sent = list(hub.sent)
        assert "config.json" in sent and f"Bearer {TOKEN}" in hub.tokens
        assert changed_hosts(operator.run(*words)) == {set_up(NAMES[0]).split("@")[1]: 0}
        assert hub.sent == sent
    snapshot = f"/var/lib/mixtral-run/huggingface/hub/models--{NAME.replace('/', '--')}/snapshots/{COMMIT}"
    found = json.loads(host.run("cat", f"{snapshot}/config.json"))
    assert found == json.loads((operator.folder / "hf-model/config.json").read_text())


def test_a_host_that_dies_stops_the_other(operator: Operator, fleet: Fleet, set_up: Callable[[str], str]) -> None:
    both = ",".join(set_up(name) for name in NAMES)
    words = ("--load", "base", "--mock-data", "--nproc-per-node", "1", *LAYOUT[:-1], "10000")
    started = operator.run("pretrain", "--on", both, *JOB, *words, "--detach")
    (job,) = re.findall(r"^(pretrain-\S+) runs on", started, re.MULTILINE)
    fleet.hosts[NAMES[1]].run("docker", "kill", job)
    output = operator.run("logs", "-f", job, "--on", both, code=6)
    assert "ended with exit code 137: stopping the job on" in output
    assert job not in operator.run("jobs", "--running")


def answer_prompt(operator: Operator, words: tuple[str, ...], prompt: str, password: str) -> None:
    """Run mixtral-run in a terminal, answer its prompt, and check that it succeeds without showing the answer."""
    terminal = pexpect.spawn(
        sys.executable, ["-m", "mixtral_run", *words],
        cwd=str(operator.folder), env=operator.environment, encoding="utf-8", timeout=240, dimensions=(40, 120),
    )  # fmt: skip
    terminal.expect(prompt)
    terminal.sendline(password)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0, terminal.before
    assert password not in (terminal.before or "")


def test_the_token_is_on_the_host_in_one_file_and_nowhere_else_and_nothing_listens(
    operator: Operator, fleet: Fleet, set_up: Callable[[str], str]
) -> None:
    # This other token is typed in. No host has it yet, so it must be sent. It contains TOKEN, which the test looks for.
    typed = TOKEN + "Typed"
    words = ("-e", "@variables.json", "--tags", "hf_cache", "--diff", "--hf-token-file", "-")
    talkative = replace(operator, environment={**operator.environment, "ANSIBLE_VERBOSITY": "3", "ANSIBLE_DEBUG": "1"})
    with seen_arguments() as seen:
        answer_prompt(talkative, ("bootstrap", *map(set_up, NAMES), *words), "Hugging Face token", typed)
    (operator.folder / "token").write_text(typed)
    assert any("ansible-playbook" in each for each in seen)
    assert any(each.startswith("sudo ") for each in seen)  # on the hosts
    assert not any(TOKEN in each for each in seen)
    for host in fleet.hosts.values():
        home = "/var/lib/mixtral-run/huggingface/token"
        assert host.run("stat", "-c", "%a", home).strip() == "640"
        assert host.run("cat", home).strip() == typed
        found = host.shell(
            f"grep -rlF {TOKEN} /etc /home /root /tmp /var/log /run/log /var/lib/mixtral-run /srv 2>/dev/null; "
            f"journalctl --no-pager | grep -cF {TOKEN}; "
            f"docker ps -aq | xargs -r docker inspect | grep -cF {TOKEN}",
            check=False,
        )
        assert found.split() == [home, "0", "0"]
        # containerd itself listens on loopback.
        listening = {line.split()[3] for line in host.run("ss", "-Hltn").splitlines()}
        assert {each for each in listening if not each.startswith("127.")} == {"0.0.0.0:22", "[::]:22"}
    kept = [file.read_text(errors="replace") for file in (operator.folder / "state").rglob("*") if file.is_file()]
    assert any("VALUE_SPECIFIED_IN_NO_LOG_PARAMETER" in each for each in kept)  # -vvv shows all options
    assert not any(TOKEN in each for each in kept)


def test_after_a_reimage_one_host_changes_and_the_other_does_not(
    operator: Operator, fleet: Fleet, set_up: Callable[[str], str]
) -> None:
    first, second = NAMES
    page = operator.folder / "status.html"
    operator.run("status", "--html", str(page), "--checkpoints-folder", CHECKPOINTS)
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


def test_teardown_leaves_the_host_as_it_was(operator: Operator, fleet: Fleet, bootstrapped: dict[str, int]) -> None:
    host, target = fleet.hosts[NAMES[1]], fleet.target(NAMES[1])
    assert changed_hosts(operator.run("bootstrap", target, *SETTINGS)) == {target.split("@")[1]: 0}
    words = ("teardown", target, "-e", "@variables.json")
    host.run("docker", "run", "--detach", "--name", "job", "--label", "org.mixtral-run.job=job",
             "--label", "org.mixtral-run.verb=finetune", "--entrypoint", "sleep", IMAGE, "1000000")  # fmt: skip
    assert "job (finetune) is running" in operator.run(*words, "--yes", code=3)
    host.run("docker", "rm", "--force", "job")
    assert "--yes" in operator.run(*words, code=2)
    assert difference(fleet.bare[NAMES[1]], snapshot(host))  # the comparison sees what bootstrap has added
    told = json.loads(operator.call(*words, "--yes", "--json").stdout)
    assert told["hosts"][0]["result"] == "done" and told["hosts"][0]["removed"]
    assert difference(fleet.bare[NAMES[1]], snapshot(host)) == []
    assert json.loads(operator.call(*words, "--yes", "--json").stdout)["hosts"][0]["removed"] == []


def test_a_password_puts_the_key_there_once(operator: Operator, fleet: Fleet) -> None:
    name, password = NAMES[0], 'it\'s a "pass" word'
    host = fleet.hosts[name]
    host.shell(f"rm -f ~{targets.USER}/.ssh/authorized_keys")
    targets.put(host, f"{targets.USER}:{password}\n", "/root/password", "600")
    host.shell("chpasswd < /root/password; rm /root/password")
    words = [fleet.target(name), "--check", "--tags", "preflight", "-e", "@variables.json"]
    assert "bootstrap --ask-pass" in operator.run("bootstrap", *words, code=3)
    answer_prompt(operator, ("bootstrap", "--ask-pass", *words), "SSH password", password)
    key = ssh_key().with_suffix(".pub").read_text().split()[1]
    assert host.shell(f"grep -c {key} ~{targets.USER}/.ssh/authorized_keys").strip() == "1"
    operator.run("bootstrap", *words)


def test_sudo_with_a_password(operator: Operator, fleet: Fleet) -> None:
    name, password = NAMES[1], "sudo's $(own) word"
    host = fleet.hosts[name]
    targets.put(host, f"{targets.USER}:{password}\n", "/root/password", "600")
    host.shell("chpasswd < /root/password; rm /root/password; sed -i 's/NOPASSWD://' /etc/sudoers.d/ops")
    words = ("bootstrap", fleet.target(name), "--check", "--tags", "preflight", "-e", "@variables.json")
    assert "bootstrap --ask-become-pass" in operator.run(*words, code=3)
    answer_prompt(operator, (*words, "--ask-become-pass"), "sudo password", password)
    host.shell("sed -i 's/ALL$/NOPASSWD:ALL/' /etc/sudoers.d/ops")
