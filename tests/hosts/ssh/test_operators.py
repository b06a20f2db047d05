"""Two operators at the same host: the second is refused in words, and no lock outlives its holder."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mixtral_run.fleet.bootstrap import bootstrap as bootstrap_module
from mixtral_run.fleet.bootstrap import host_lock
from mixtral_run.fleet.bootstrap.host_lock import hold_locks, holder_text
from mixtral_run.fleet.history import history_of
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.plays import control_sockets
from mixtral_run.fleet.ssh.connection import Ssh
from tests.hosts.conftest import PLAYBOOKS, HostMaker, Run
from tests.hosts.light_hosts import LightHost

ROOT = Path(__file__).parents[3]
LOCK = "setup.lock"


@pytest.fixture
def host(light_hosts: HostMaker) -> LightHost:
    (found,) = light_hosts(1)
    return found


def problem_of(host: Host) -> str:
    with hold_locks(Ssh(), (host,), "mixtral-run teardown") as held:
        return " ".join(map(str, held.problems.values()))


def wait_until_free(host: Host) -> None:
    until = time.monotonic() + 20
    while problem_of(host):
        assert time.monotonic() < until
        time.sleep(0.2)


def holders(host: LightHost) -> list[psutil.Process]:
    assert host.process is not None
    below = psutil.Process(host.process.pid).children(recursive=True)
    return [each for each in below if "flock -n" in " ".join(each.cmdline())]


def test_the_second_is_told_who_the_first_is(host: LightHost) -> None:
    target = parse_host(host.target)
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap") as held:
        assert held.problems == {} and held.notes == {}
        problem = problem_of(target)
        assert "Another operator changes 127.0.0.1" in problem
        assert f"mixtral-run bootstrap by {getpass.getuser()}@{os.uname().nodename}, process {os.getpid()}" in problem
        # Who asks and is refused changes nothing.
        assert json.loads((host.folder / LOCK).read_text())["pid"] == os.getpid()
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap") as held:
        assert held.problems == {} and held.notes == {}
    assert holders(host) == []


def test_it_dies_with_the_connection_and_with_its_process(host: LightHost) -> None:
    target = parse_host(host.target)
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap") as held:
        held.processes[0].kill()
        wait_until_free(target)
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap"):
        for each in holders(host):
            each.kill()
        with hold_locks(Ssh(), (target,), "mixtral-run bootstrap") as held:
            assert held.problems == {}
            (note,) = held.notes.values()
            assert note.startswith("An earlier run was cut off before it had ended: mixtral-run bootstrap by ")


def test_a_network_that_fails_frees_it(host: LightHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_lock, "SIGN_SECONDS", 0.2)
    monkeypatch.setattr(host_lock, "SILENT_SECONDS", 1)
    target = parse_host(host.target)
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap"):
        time.sleep(1.5)
        assert "Another operator" in problem_of(target)
    monkeypatch.setattr(host_lock, "SIGN_SECONDS", 1000)
    with hold_locks(Ssh(), (target,), "mixtral-run bootstrap"):
        wait_until_free(target)


def test_a_host_without_locks_is_set_up_and_that_is_said(
    host: LightHost, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("content")
    (host.folder / LOCK).symlink_to(tmp_path / "victim")
    monkeypatch.setattr(bootstrap_module, "playbook", {"bootstrap": PLAYBOOKS / "visit.yml"}.__getitem__)
    end, text = run(host.target, more=(f"visit_history={tmp_path / 'history.jsonl'}",))
    assert not end.progress.bad and "Two operators are not kept apart here" in text and LOCK in text, text
    assert (tmp_path / "victim").read_text() == "content"


def test_bootstrap_leaves_a_host_of_another_operator_and_sets_up_the_others(light_hosts: HostMaker, run: Run) -> None:
    hosts = light_hosts(2)
    with hold_locks(Ssh(), (parse_host(hosts[0].target),), "mixtral-run teardown"):
        end, text = run(hosts[0].target, hosts[1].target)
        assert [each.name for each in end.progress.bad] == [f"127.0.0.1:{hosts[0].port}"]
        assert "Another operator changes" in text and "mixtral-run teardown by" in text
        # --check changes nothing and asks nobody.
        assert not run(hosts[0].target, check=True)[0].progress.bad


def test_a_play_without_the_command_line_keeps_others_away_as_well(host: LightHost, tmp_path: Path) -> None:
    target, history = parse_host(host.target), tmp_path / "history.jsonl"
    inventory = tmp_path / "inventory"
    inventory.write_text(f"gpu-01 ansible_host=127.0.0.1 ansible_port={host.port}\n")
    words = [
        Path(sys.executable).with_name("ansible-playbook"), PLAYBOOKS / "visit.yml", "--inventory", inventory,
        "--ssh-common-args", "-o StrictHostKeyChecking=accept-new",
        "--extra-vars", f"visit_history={history} ansible_python_interpreter={sys.executable}",
    ]  # fmt: skip

    def play(*more: str) -> subprocess.Popen[bytes]:
        argv = [*map(str, words), *more]
        # The test's home folder may have a path that is too long for Ansible's sockets.
        environment = {**os.environ, **control_sockets.settings()}
        return subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    with hold_locks(Ssh(), (target,), "mixtral-run teardown"):
        refused = play()
        told = refused.communicate()[0].decode()
        assert refused.returncode and "mixtral-run teardown by" in told and "Change something" not in told, told
        assert not history.exists()
    assert play().wait() == 0
    first = play("--extra-vars", "visit_seconds=100")
    try:
        while len(history.read_text().splitlines()) < 3:
            assert first.poll() is None
            time.sleep(0.1)
        assert f"mixtral-run bootstrap by {getpass.getuser()}@" in problem_of(target)
    finally:
        first.kill()
        first.wait()
    wait_until_free(target)
    visits = history_of("gpu-01", history.read_text()).visits
    assert [(visit.outcome, visit.changed) for visit in visits] == [("done", ("Change something",)), ("no end", ())]


def test_the_command_line_keeps_its_own_lock_and_the_host_records_the_run(
    host: LightHost, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bootstrap_module, "playbook", {"bootstrap": PLAYBOOKS / "visit.yml"}.__getitem__)
    end, text = run(host.target, more=(f"visit_history={tmp_path / 'history.jsonl'}",))
    assert not end.progress.bad, text
    (visit,) = history_of("gpu-01", (tmp_path / "history.jsonl").read_text()).visits
    assert (visit.verb, visit.outcome, visit.changed) == ("bootstrap", "done", ("Change something",))


@pytest.mark.parametrize(
    "note",
    [
        "", "null", "[]", "no JSON", '{"pid": 1}', "[" * 3000,
        '{"command": 1, "user": "a", "host": "b", "since": "c", "pid": 1}',
        '{"command": "", "user": "a", "host": "b", "since": "c", "pid": 1}',
    ],
)  # fmt: skip
def test_an_odd_note_is_no_holder(note: str) -> None:
    assert holder_text(note) == "a holder that does not name itself"


def test_a_note_loses_control_sequences() -> None:
    note = {"command": "x\x1b[31m", "user": "ops", "host": "laptop\n", "pid": 7, "since": "2026"}
    assert holder_text(json.dumps(note)) == "x by ops@laptop, process 7, since 2026"
