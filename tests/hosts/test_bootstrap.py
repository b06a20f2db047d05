"""bootstrap over simulated hosts with a small playbook: a failure on one host does not stop the others.

end_to_end/ runs the real playbook over throw-away hosts, because simulated hosts share this machine's files.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.commands.bootstrap import bootstrap as command
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.bootstrap import bootstrap as module
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapEnd, BootstrapRequest, last_request
from mixtral_run.fleet.bootstrap.progress import Phase
from mixtral_run.fleet.hosts import remembered_hosts
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import start
from mixtral_run.fleet.plays.provisioning import provisioning_folder
from mixtral_run.fleet.secrets import token_file
from mixtral_run.fleet.selection import hosts_of
from mixtral_run.fleet.state import state_folder, write_json
from mixtral_run.fleet.status.read_fleet import read_fleet
from tests.hosts.conftest import PLAYBOOKS, HostMaker, Run, inventory_name, seen_arguments
from tests.hosts.engine import StandInEngine
from tests.hosts.light_hosts import free_ports
from tests.support.screen import on_terminal


def command_line(playbook: Path) -> str:
    """Return a program that runs mixtral-run with another playbook for bootstrap."""
    return (
        "from pathlib import Path\nimport sys, mixtral_run.fleet.bootstrap.bootstrap as module\n"
        f"module.playbook = lambda name: Path({str(playbook)!r})\n"
        "from mixtral_run.cli.main import main\n"
        "sys.argv = ['mixtral-run', *sys.argv[1:]]\nmain()\n"
    )


def test_a_dead_a_refusing_and_a_failing_host_leave_the_others_alone(
    run: Run, light_hosts: HostMaker, tmp_path: Path
) -> None:
    good, refusing, failing = light_hosts(3)
    (down,) = free_ports(1)
    config = refusing.folder / "sshd_config"
    config.write_text(re.sub("AuthorizedKeysFile .*", "AuthorizedKeysFile /dev/null", config.read_text()))
    refusing.stop()
    refusing.start()
    end, text = run(
        good.target,
        refusing.target,
        failing.target,
        f"127.0.0.1:{down}",
        more=(f"small_failing={inventory_name(failing)}",),
    )
    phases = [host.phase for host in end.progress.hosts.values()]
    assert phases == [Phase.DONE, Phase.UNREACHABLE, Phase.FAILED, Phase.UNREACHABLE]
    assert "refuses the key" in text
    assert "bootstrap --ask-pass" in text
    assert "Fail in the middle" in text
    assert "unattended-upgrades" in text
    assert f"✓ 127.0.0.1:{good.port}" in text
    assert "retry: mixtral-run bootstrap --retry" in text
    with pytest.raises(HostError) as caught:
        end.raise_if_bad()
    assert caught.value.exit_code == 3
    assert (tmp_path / f"{inventory_name(good)}.conf").exists()
    retried = last_request()
    given = {"check": True, "forks": None, "tags": (), "extra_vars": ("more=1",), "accept_new_host_key": ("gpu-01",)}
    again = retried.again_with(given)
    assert again.check and again.forks == retried.forks and again.accept_new_host_key == ("gpu-01",)
    assert again.extra_vars == (*retried.extra_vars, "more=1")
    assert {host.port for host in hosts_of(retried.hosts, None, retried.limit)} == {refusing.port, failing.port, down}


def test_a_retry_heeds_the_flags_beside_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    asked: list[BootstrapRequest] = []

    def stopped(request: BootstrapRequest) -> BootstrapEnd:
        asked.append(request)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "bootstrap", stopped)
    with token_file("-", lambda: "hf_typed") as typed:
        before = BootstrapRequest(hosts=("gpu-01", "gpu-02"), limit="gpu-02", forks=7, hf_token_file=typed)
        write_json(state_folder() / "retry.json", before.to_record())
    words = ["--retry", "--check", "--tags", "docker", "-e", "a=1", "--serial", "2", "--accept-new-host-key", "gpu-02"]
    CliRunner().invoke(command, words)
    assert asked == [
        BootstrapRequest(
            hosts=("gpu-01", "gpu-02"), limit="gpu-02", forks=7, check=True, tags=("docker",), extra_vars=("a=1",),
            serial="2", accept_new_host_key=("gpu-02",),
        )
    ]  # fmt: skip


def test_a_second_run_changes_nothing_and_check_changes_nothing(
    run: Run, light_hosts: HostMaker, tmp_path: Path
) -> None:
    (host,) = light_hosts(1)
    end, text = run(host.target, check=True, diff=True)
    assert "would change" in text
    assert "+host 127.0.0.1" in text
    assert not (tmp_path / f"{inventory_name(host)}.conf").exists()
    end, _ = run(host.target)
    assert next(iter(end.progress.hosts.values())).changed == 1
    end, _ = run()  # no name means the fleet that was set up before
    assert next(iter(end.progress.hosts.values())).changed == 0
    with pytest.raises(ConfigError, match="nothing to retry"):
        last_request()


def test_a_changed_host_key_is_refused_until_it_is_accepted(run: Run, light_hosts: HostMaker, home: Path) -> None:
    (host,) = light_hosts(1)
    # The user's own known_hosts file contains the old key as well and stays unchanged.
    own = home / ".ssh/known_hosts"
    own.write_text(f"[127.0.0.1]:{host.port} {(host.folder / 'host_key.pub').read_text()}")
    before = own.read_text()
    end, _ = run(host.target)
    assert not end.progress.bad
    host.reimage()
    end, text = run(host.target)
    assert end.progress.bad
    name = f"127.0.0.1:{host.port}"
    assert f"--accept-new-host-key {name} {host.target}" in text
    end, _ = run(host.target, accept_new_host_key=(name,))
    assert not end.progress.bad
    end, _ = run(host.target)
    assert not end.progress.bad
    assert own.read_text() == before


def test_a_users_inventory_is_taken_as_it_is(run: Run, light_hosts: HostMaker, tmp_path: Path) -> None:
    first, second = light_hosts(2)
    inventory = tmp_path / "inventory" / "hosts.yml"
    (inventory.parent / "group_vars").mkdir(parents=True)
    (inventory.parent / "group_vars/all.yml").write_text("small_words: from the group\n")
    inventory.write_text(
        "mixtral_hosts:\n  hosts:\n"
        f"    rack-1: {{ansible_host: 127.0.0.1, ansible_port: {first.port}}}\n"
        f"    rack-2: {{ansible_host: 127.0.0.1, ansible_port: {second.port},"
        # A jump host is set in the same way. The kit's own record of host keys still applies.
        " ansible_ssh_common_args: '-o ConnectionAttempts=2'}\n"
    )
    end, _ = run(inventory=inventory, limit="rack-2")
    assert list(end.progress.hosts) == ["rack-2"]
    assert (tmp_path / "rack-2.conf").read_text() == "host rack-2 from the group\n"
    # The remembered host is set up again with the variables of its inventory.
    (tmp_path / "rack-2.conf").unlink()
    end, _ = run()
    assert not end.progress.bad
    assert (tmp_path / "rack-2.conf").read_text() == "host rack-2 from the group\n"
    with pytest.raises(ConfigError, match=f"-i {inventory} --limit rack-2"):
        run("rack-2", first.target)
    with pytest.raises(ConfigError, match="rack-9"):
        run(inventory=inventory, limit="rack-9")


def test_a_host_of_an_inventory_is_not_set_up_without_its_variables(
    run: Run, light_hosts: HostMaker, tmp_path: Path
) -> None:
    (host,) = light_hosts(1)
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(f"all: {{hosts: {{rack-1: {{ansible_host: 127.0.0.1, ansible_port: {host.port}}}}}}}\n")
    run(inventory=inventory)
    (known,) = remembered_hosts()
    for words in ("other-user@rack-1", host.target):
        with pytest.raises(ConfigError, match=f"bootstrap -i {inventory} --limit rack-1"):
            run(words)
    assert remembered_hosts() == (known,)
    # A job that reaches the host by its address does not change the record either.
    StandInEngine(host)
    config = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)
    start("finetune", config, JobOptions(on=(host.target,), checkpoints_folder=str(tmp_path)))
    assert remembered_hosts() == (known,)
    inventory.unlink()
    end, _ = run(host.target)
    assert not end.progress.bad


def test_an_inventory_may_compute_its_hosts_from_the_environment(
    run: Run, light_hosts: HostMaker, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host,) = light_hosts(1)
    # Like a cloud's inventory plugin, the script lists no host without its key.
    hosts = {"rack-1": {"ansible_host": "{{ 'local' ~ 'host' }}", "ansible_port": "{{ port }}", "port": host.port}}
    listing = {"all": {"hosts": list(hosts)}, "_meta": {"hostvars": hosts}}
    inventory = tmp_path / "cloud"
    inventory.write_text(
        f"#!/bin/sh\n[ \"$CLOUD_KEY\" = 'it is a secret' ] || {{ echo '{{}}'; exit; }}\ncat <<'END'\n"
        f"{json.dumps(listing)}\nEND\n"
    )
    inventory.chmod(0o755)
    monkeypatch.setenv("CLOUD_KEY", "it is a secret")
    end, _ = run(inventory=inventory)
    assert [each.phase for each in end.progress.hosts.values()] == [Phase.DONE]
    (found,) = remembered_hosts()
    assert (found.address, found.port) == ("localhost", host.port)
    for file in (home / "state").rglob("*"):
        assert not file.is_file() or "it is a secret" not in file.read_text(errors="replace"), file


def test_a_template_that_has_no_value_is_reported_with_host_and_variable(tmp_path: Path, home: Path) -> None:
    inventory = tmp_path / "hosts.yml"
    inventory.write_text("all: {hosts: {rack-1: {ansible_port: '{{ nowhere }}'}, rack-2: {}}}\n")
    with pytest.raises(ConfigError, match=r"rack-1: ansible_port: .*'nowhere' is undefined"):
        hosts_of((), inventory, None)
    inventory.write_text("all: {hosts: {rack-1: {ansible_port: many}}}\n")
    with pytest.raises(ConfigError, match="rack-1 has an invalid port"):
        hosts_of((), inventory, None)


def test_ctrl_c_stops_within_a_second_and_says_what_was_left(light_hosts: HostMaker, tmp_path: Path) -> None:
    (host,) = light_hosts(1)
    variables = f"small_folder={tmp_path} ansible_python_interpreter={sys.executable} small_seconds=60"
    process = subprocess.Popen(
        [sys.executable, "-c", command_line(PLAYBOOKS / "small.yml"), "bootstrap", host.target, "-e", variables],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    plays = Path(os.environ["XDG_STATE_HOME"]) / "mixtral-run/plays"
    until = time.monotonic() + 90
    while time.monotonic() < until and not any(
        "Take a while" in file.read_text() for file in plays.glob("*/artifacts/run/stdout")
    ):
        time.sleep(0.1)
    time.sleep(0.5)
    pressed = time.monotonic()
    process.send_signal(2)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - pressed < 1.5  # one second, plus the interpreter's shutdown on a busy machine
    assert process.returncode == 130
    assert "stopped at Take a while" in output
    assert "retry: mixtral-run bootstrap --retry" in output
    assert "Traceback" not in output


def test_the_token_is_in_no_argument_artifact_or_log(
    run: Run, light_hosts: HostMaker, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host,) = light_hosts(1)
    token, secret = "hf_abcdefghijklmnopqrstuvwxyz", tmp_path / "token"
    secret.write_text(token + "\n")
    monkeypatch.setenv("HF_TOKEN", token)  # as on many laptops
    secret.chmod(0o600)
    with seen_arguments() as seen:
        end, text = run(host.target, hf_token_file=secret, become_password="the sudo password")
    assert not end.progress.bad
    assert any("ansible-playbook" in words for words in seen)
    for forbidden in (token, "the sudo password"):
        assert not any(forbidden in words for words in seen)
        assert forbidden not in text
        for file in (home / "state").rglob("*"):
            if file.is_file():
                assert forbidden not in file.read_text(errors="replace"), file
    for folder in (home / "state/mixtral-run").rglob("plays"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"hf_token_file": Path("/no/such/token")}, "--hf-token-file"),
        ({"serial": "two"}, "--serial: expected a number of hosts"),
        ({"tags": ("docker", "swop")}, "--tags: expected some of acceptance, docker, .*; found swop"),
        ({"more": ("@/no/such/vars.yml", "broken")}, "no such file"),
        ({"accept_new_host_key": ("gpu-99",)}, "--accept-new-host-key"),
    ],
)
@pytest.mark.usefixtures("home")  # with no hosts remembered
def test_problems_are_reported_before_anything_starts(run: Run, settings: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        run("gpu-01", **settings)
    assert remembered_hosts() == ()


def test_fifty_hosts_are_shown_and_read_within_two_minutes(light_hosts: HostMaker, tmp_path: Path) -> None:
    hosts = light_hosts(50)
    for number, host in enumerate(hosts):
        host.program("docker", "#!/bin/sh\nexit 1\n")
        host.program("nvidia-smi", standin_nvidia_smi("535.183.01" if number == 7 else "550.54.15"))
    fifty = tmp_path / "fifty.yml"
    fifty.write_text(
        "- hosts: all\n  gather_facts: false\n  tasks:\n"
        "    - {name: Look, raw: 'true', changed_when: false}\n    - {name: Look again, raw: 'echo $HOME'}\n"
    )
    began = time.monotonic()
    screen = on_terminal(command_line(fifty), ["bootstrap", *(host.target for host in hosts)], height=24)
    assert screen.scrolled_while_moving == 0
    end = "\n".join([*screen.scrolled, *screen.lines])
    assert all(re.search(rf"^✓ 127.0.0.1:{host.port} +done +1 +2$", end, re.MULTILINE) for host in hosts), end
    assert "50 done in" in end
    assert any("and 30 more: " in line for line in screen.frames[0])
    statuses = read_fleet(remembered_hosts())
    assert time.monotonic() - began < 120
    assert all(status.reachable and status.error is None for status in statuses)
    differing = [status.name for status in statuses if any("driver" in reported for reported in status.differences)]
    assert differing == [f"127.0.0.1:{hosts[7].port}"]
    assert sum(status.num_gpus for status in statuses) == 400


def standin_nvidia_smi(driver: str) -> str:
    """Return a STAND-IN for nvidia-smi that answers the kit's only query, for 8 GPUs."""
    rows = "\n".join(f"{n}, NVIDIA H100 80GB HBM3, GPU-{n}, 81559, {driver}, 40, 0" for n in range(8))
    return f"#!/bin/sh\ncat <<'END'\n{rows}\nEND\n"


@pytest.mark.parametrize("lost", [False, True], ids=["fails", "is lost"])
def test_a_host_alone_in_its_turn_keeps_no_later_one_from_its_end(
    run: Run, light_hosts: HostMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    first, second, third = light_hosts(3)
    assert first.process is not None
    # The real playbook runs stub roles. One of them fails on the first host or ends its connection.
    book = tmp_path / "playbooks/bootstrap.yml"
    for folder in ("playbooks", "roles"):  # the real roles are used for the check of their variables only
        shutil.copytree(provisioning_folder() / folder, tmp_path / folder)
    break_off = f"pkill -9 -P {first.process.pid}; kill -9 {first.process.pid}" if lost else "exit 1"
    before = ("preflight", "nvidia_driver")
    roles = (*before, "docker", "nvidia_container_toolkit", "swap", "image", "hf_cache", "health", "acceptance")
    for role in roles:
        command = break_off if role == "docker" else f"echo {role} {{{{ inventory_hostname }}}} >> {tmp_path}/done"
        tasks = [{"ansible.builtin.raw": command, "name": f"Do {role}"}]
        if role == "docker":
            tasks[0]["when"] = f"inventory_hostname == '{inventory_name(first)}'"
        (book.parent / f"roles/{role}/tasks").mkdir(parents=True)
        (book.parent / f"roles/{role}/tasks/main.yml").write_text(json.dumps(tasks))
    monkeypatch.setattr(module, "playbook", {"bootstrap": book}.__getitem__)
    end, _ = run(first.target, second.target, third.target, serial="1", more=("ansible_become=false",))
    phases = [host.phase for host in end.progress.hosts.values()]
    assert phases == [Phase.UNREACHABLE if lost else Phase.FAILED, Phase.DONE, Phase.DONE]
    rest = [f"{role} {inventory_name(host)}" for host in (second, third) for role in roles if role != "docker"]
    assert (tmp_path / "done").read_text().splitlines() == [
        *(f"{role} {inventory_name(first)}" for role in before),
        *rest,
    ]


@pytest.mark.parametrize(("serial", "expected"), [("1", 1), ("3", 3), ("25%", 2), ("1%", 1), ("90", 90)])
def test_hosts_at_a_time(serial: str, expected: int) -> None:
    assert module._hosts_at_once(serial, 8) == expected
