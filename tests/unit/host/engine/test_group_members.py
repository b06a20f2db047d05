"""Members of the group docker: the role takes out only whom it added, says so, and nobody whose processes run."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.module_utils.basic import AnsibleModule

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("docker_engine")
GROUP = MODULE.group_members


class Host:
    """A host with a group docker, which the kit's programs change, and users whose processes run."""

    def __init__(self, records: Path, programs: Programs) -> None:  # noqa: F811
        self.records, self.programs = records, programs
        self.theirs, self.working, self.warnings = {"theirs"}, {}, []

    def members(self) -> set[str]:
        """Return the members, those that the stand-in programs added and removed included."""
        found = set(self.theirs)
        for call in self.programs.calls():
            words = call.split()
            if words[0] == "usermod":
                found.add(words[-1])
            elif words[0] == "gpasswd":
                found.discard(words[2])
        return found

    def run(self, *users: str, add: tuple[str, ...] = (), **more: object) -> dict:
        """Run the module and return its result."""
        self.warnings.clear()
        return call_module(MODULE, self.records, users=list(users), add_users=list(add), **more)


@pytest.fixture
def host(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:  # noqa: F811
    made = Host(tmp_path / "records", programs)
    for name in ("usermod", "gpasswd", "docker", "journalctl"):
        programs.put(name)
    programs.put("nvidia-smi", "exit 127")
    programs.put("systemctl", 'case "$1" in is-active) echo active ;; is-enabled) echo enabled ;; esac')
    monkeypatch.setattr(MODULE.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(GROUP, "members", made.members)
    monkeypatch.setattr(GROUP, "exists", lambda user: user != "nobody-here")
    monkeypatch.setattr(GROUP, "running_work", lambda user: made.working.get(user, ""))
    monkeypatch.setattr(AnsibleModule, "warn", lambda _, text: made.warnings.append(text))
    return made


def test_a_user_who_is_added_for_good_changes_nobody_else_and_stays(host: Host) -> None:
    host.run("ops")
    added = host.run("ops", add=("guest",))
    assert added["shown"] == ["added guest to group docker"]
    assert added["diff"] == [
        {"before_header": "members of group docker", "after_header": "members of group docker",
         "before": "ops\ntheirs\n", "after": "guest\nops\ntheirs\n"}
    ]  # fmt: skip
    assert not host.run("ops")["changed"] and host.members() == {"theirs", "ops", "guest"}
    # Once in the list, the user is one of it.
    assert not host.run("ops", "guest")["changed"]
    assert host.run("ops")["shown"] == ["took guest out of group docker"] and host.members() == {"theirs", "ops"}


def test_one_user_given_by_hand_leaves_the_others_of_the_fleet_in(host: Host) -> None:
    """The command that a refused job names must not take the group from the users who are in it."""
    host.run("ops", "ann")
    host.working["ann"] = "python3"
    host.run("ops", "ann", add=("guest",))
    host.run("ops", "ann")
    assert host.members() == {"theirs", "ops", "ann", "guest"}


def test_who_is_no_longer_listed_is_taken_out_aloud_and_never_a_member_of_somebody_else(host: Host) -> None:
    host.run("ops", "theirs")
    assert host.run(check_mode=True)["shown"] == ["took ops out of group docker"]
    assert host.warnings == ["ops would be taken out of group docker: no longer in docker_users"]
    assert host.members() == {"theirs", "ops"}
    removed = host.run()
    assert removed["shown"] == ["took ops out of group docker"] and removed["diff"][0]["after"] == "theirs\n"
    assert host.warnings == ["ops was taken out of group docker: no longer in docker_users"]
    assert host.members() == {"theirs"} and not host.run()["changed"] and not host.warnings


def test_a_user_whose_job_runs_stays_until_it_has_ended(host: Host) -> None:
    host.run("ops")
    host.working["ops"] = "python3, torchrun"
    assert not host.run()["changed"]
    (warned,) = host.warnings
    assert "processes of ops run: python3, torchrun" in warned and "sudo gpasswd --delete ops docker" in warned
    host.working.clear()
    assert host.run()["shown"] == ["took ops out of group docker"] and host.members() == {"theirs"}


def test_taking_the_role_back_takes_out_all_that_it_added(host: Host) -> None:
    host.run("ops", add=("guest", "theirs"))
    assert host.run(state="absent")["shown"] == ["took ops out of group docker", "took guest out of group docker"]
    assert host.members() == {"theirs"}


def test_users_who_are_not_on_the_host_and_programs_that_fail_are_reported(host: Host) -> None:
    refused = host.run("nobody-here", "ops")
    assert refused["failed"] and "nobody-here" in refused["msg"] and host.members() == {"theirs"}
    host.programs.put("usermod", "echo 'usermod: cannot lock /etc/group' >&2; exit 10")
    failed = host.run("ops")
    assert failed["failed"] and "cannot lock /etc/group" in failed["msg"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts processes of another user")
def test_the_processes_of_a_user_are_found_wherever_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GROUP.pwd, "getpwnam", lambda _: SimpleNamespace(pw_uid=54321))
    assert GROUP.running_work("ops") == ""
    with subprocess.Popen(["sleep", "60"], user=54321) as process:
        try:
            assert GROUP.running_work("ops") == "sleep"
            with monkeypatch.context() as patch:
                patch.setattr(GROUP, "_ancestors", lambda: {str(process.pid)})
                assert GROUP.running_work("ops") == ""
        finally:
            process.kill()
    # The end of an SSH connection is no work. Another folder than that of pytest, which is closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        login = shutil.copy(shutil.which("sleep"), folder + "/sshd")
        with subprocess.Popen([login, "60"], user=54321) as process:
            try:
                assert Path(f"/proc/{process.pid}/comm").read_text() == "sshd\n" and GROUP.running_work("ops") == ""
            finally:
                process.kill()
    monkeypatch.undo()
    assert {str(os.getpid()), str(os.getppid())} <= GROUP._ancestors()
