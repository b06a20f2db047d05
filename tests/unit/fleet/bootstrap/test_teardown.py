"""teardown lists what goes and what stays, asks, and refuses hosts with jobs before anything is changed."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from mixtral_run.cli.commands.teardown import teardown as command
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.bootstrap import host_lock
from mixtral_run.fleet.bootstrap import teardown as module
from mixtral_run.fleet.bootstrap.host_lock import Held
from mixtral_run.fleet.bootstrap.teardown import LEFT_ON_HOSTS, STAYS, Removal, TeardownRequest, listing, teardown
from mixtral_run.fleet.hosts import Host, remember_hosts, remembered_hosts
from mixtral_run.fleet.jobs.jobs import JobRow
from mixtral_run.fleet.plays.runner import Play, PlayEnd

ONE, TWO = Host("gpu-01", "gpu-01", "ubuntu"), Host("gpu-02", "gpu-02", "ubuntu")
CHANGES = (
    ("image", "Keep the image", {"changed": True, "removed": ["mixtral-run:local"]}),
    ("swap", "Keep a swap file", {"changed": False}),
    ("docker", "Remove settings", {"changed": True, "restored": ["docker.io 20"], "notes": ["runc stays away"]}),
)


class StandInPlay:
    """Stand-in for a run of the playbook in which every host has the same changes."""

    seen: ClassVar[list[Play]] = []

    def __init__(self, play: Play, changes: Any = CHANGES, failed: bool = False) -> None:
        self.play, self.changes, self.failed = play, changes, failed
        self.seen.append(play)

    def events(self) -> Iterator[dict[str, Any]]:
        names = [host.inventory_name for host in self.play.hosts]
        for name in names:
            for role, task, result in self.changes:
                data = {"host": name, "role": role, "task": task, "res": result}
                yield {"event": "runner_on_ok", "event_data": data}
        failures = dict.fromkeys(names, 1) if self.failed else {}
        yield {"event": "playbook_on_stats", "event_data": {"processed": dict.fromkeys(names, 1), "failures": failures}}

    def wait(self, seconds: float | None = None) -> PlayEnd:
        return PlayEnd("successful", 0, Path("/artifacts"), "")


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember two hosts that answer and run no jobs."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    remember_hosts([ONE, TWO])
    StandInPlay.seen = []
    ssh = SimpleNamespace(
        each=lambda hosts, call: [call(host) for host in hosts],
        check=lambda *_, **__: None,
        known_hosts=tmp_path / "known",
    )
    monkeypatch.setattr(module, "Ssh", lambda: ssh)
    monkeypatch.setattr(module, "list_jobs", lambda *_: ([], []))
    monkeypatch.setattr(module, "hold_locks", lambda *_: nullcontext(Held()))


def run(answer: bool = True, starter: Any = StandInPlay, **settings: Any) -> tuple[Any, str, list[str]]:
    stream, asked = io.StringIO(), []

    def confirm(words: str) -> bool:
        asked.append(words)
        return answer

    end = teardown(TeardownRequest(**{"hosts": ("gpu-01", "gpu-02"), **settings}), confirm, stream, starter)
    return end, stream.getvalue(), asked


def test_it_lists_asks_and_takes_back(hosts: None) -> None:
    end, said, asked = run()
    assert [play.check for play in StandInPlay.seen] == [True, False]
    assert all(play.playbook.name == "teardown.yml" for play in StandInPlay.seen)
    assert "  - image · Keep the image: mixtral-run:local" in said and "swap" not in said.partition("this goes")[2]
    assert all(line in said for line in STAYS)
    assert "this comes back, which the kit had replaced\n  - docker.io 20\n  - runc stays away\n" in said
    assert len(asked) == 1
    assert remembered_hosts() == ()
    told = json.loads(end.to_json())
    assert [host["name"] for host in told["hosts"]] == ["gpu-01", "gpu-02"]
    assert told["hosts"][0]["result"] == "done" and told["hosts"][0]["failure"] is None
    assert told["hosts"][0]["removed"] == [
        {"task": "image · Keep the image", "removed": ["mixtral-run:local"], "restored": [], "notes": []},
        {"task": "docker · Remove settings", "removed": [], "restored": ["docker.io 20"], "notes": ["runc stays away"]},
    ]
    assert not told["check"] and told["stays"] == list(STAYS)


def test_what_is_left_and_how_it_goes_is_told_once_it_is_over(hosts: None, tmp_path: Path) -> None:
    end, _, _ = run()
    assert "rm -r ~/.cache/mixtral-run" in end.text and f"rm -r {tmp_path}/mixtral-run" in end.text
    told = json.loads(end.to_json())["left"]
    assert len(told["hosts"]) == len(LEFT_ON_HOSTS) and told["here"][0]["remove"] == f"rm -r {tmp_path}/mixtral-run"
    for settings in ({"check": True}, {"tags": ("swap",)}):
        remember_hosts([ONE, TWO])
        assert "rm -r" not in run(**settings)[0].text


@pytest.mark.parametrize(
    ("settings", "asks"),
    [
        ({"answer": False}, True),
        ({"check": True}, False),
        ({"starter": lambda play: StandInPlay(play, ())}, False),  # nothing of the kit is there
        ({"starter": lambda play: StandInPlay(play, failed=True)}, False),
    ],
)
def test_nothing_is_changed_without_a_yes(hosts: None, settings: dict[str, Any], asks: bool) -> None:
    end, _, asked = run(**settings)
    assert bool(asked) is asks and (end is None) is asks
    assert [play.check for play in StandInPlay.seen] == [True]
    assert remembered_hosts() == (ONE, TWO)


def test_a_part_of_the_kit_leaves_the_host_in_the_fleet(hosts: None) -> None:
    run(hosts=("gpu-01",), tags=("swap",))
    assert StandInPlay.seen[1].tags == ("swap",) and remembered_hosts() == (ONE, TWO)


def job(host: Host, state: str) -> JobRow:
    return JobRow("finetune-1", "finetune", host, state, 0, False, "", "")


def test_hosts_with_jobs_are_refused(hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "list_jobs", lambda *_: ([job(ONE, "exited"), job(TWO, "running")], []))
    with pytest.raises(HostError, match=r"gpu-02: finetune-1 \(finetune\) is running") as caught:
        run()
    assert "gpu-01" not in str(caught.value) and "mixtral-run stop" in str(caught.value)
    assert not StandInPlay.seen
    monkeypatch.setattr(module, "list_jobs", lambda *_: ([job(ONE, "exited")], []))
    assert run()[0] is not None


@pytest.mark.parametrize(
    ("found", "refused"),
    [
        ("ops: docker: not found", False),
        (
            "ops: Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?",
            False,
        ),
        ("ops: permission denied while trying to connect to the Docker daemon socket", True),
        ("an answer of another form", True),
    ],
)
def test_a_host_that_does_not_tell_its_jobs_is_refused_unless_it_has_no_engine(
    hosts: None, monkeypatch: pytest.MonkeyPatch, found: str, refused: bool
) -> None:
    error = HostError("gpu-01 does not report its jobs.", found=found)
    monkeypatch.setattr(module, "list_jobs", lambda *_: ([], [error]))
    if refused:
        with pytest.raises(HostError, match="does not report its jobs"):
            run()
    assert run(hosts=("gpu-01",))[0] is not None if not refused else not StandInPlay.seen


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"hosts": ()}, "no host is named"), ({"tags": ("preflight",)}, "--tags: expected some of acceptance")],
)
def test_settings_are_checked_before_anything_starts(hosts: None, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**settings)


def test_equal_hosts_are_listed_together() -> None:
    same = [Removal("swap · Keep a swap file")]
    said = listing({"gpu-01": same, "gpu-02": same, "gpu-03": []})
    assert said.count("this goes") == 1 and "gpu-03: nothing of the kit is there." in said


def test_without_a_terminal_it_does_not_ask(hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.teardown, "__defaults__", (None, StandInPlay))
    done = CliRunner().invoke(command, ["gpu-01"])
    assert isinstance(done.exception, ConfigError) and "--yes" in str(done.exception)
    assert isinstance(CliRunner().invoke(command, ["gpu-01", "--json"]).exception, ConfigError)
    done = CliRunner().invoke(command, ["gpu-01", "--yes", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["hosts"][0]["result"] == "done"


def test_a_host_whose_lock_was_lost_is_not_done(hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    held, over = Held(), threading.Event()
    process = SimpleNamespace(stdin=io.BytesIO(), wait=lambda *_: 0)
    note = json.dumps({"command": "mixtral-run bootstrap", "user": "bob", "host": "desk", "pid": 7, "since": "now"})
    host_lock._take_again(lambda _: (process, "busy", note), TWO, held, 0, over)  # type: ignore[arg-type, return-value]
    monkeypatch.setattr(module, "hold_locks", lambda *_: nullcontext(held))
    end, _, _ = run()
    assert [host.name for host in end.progress.bad] == ["gpu-02"] and remembered_hosts() == (TWO,)
    assert "took the lock of gpu-02" in end.text and "mixtral-run bootstrap by bob@desk" in end.text


def test_a_host_that_another_operator_changes_is_not_torn_down(hosts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = HostError("Another operator changes gpu-02 now.")
    taken = Held(problems={TWO: refusal})
    monkeypatch.setattr(module, "hold_locks", lambda *_: nullcontext(taken))
    end, _, _ = run()
    assert [(play.check, play.hosts) for play in StandInPlay.seen] == [(True, (ONE, TWO)), (False, (ONE,))]
    assert [host.name for host in end.progress.bad] == ["gpu-02"] and "Another operator changes gpu-02" in end.text
    assert remembered_hosts() == (TWO,)
    taken.problems[ONE] = HostError("Another operator changes gpu-01 now.")
    remember_hosts([ONE])
    with pytest.raises(HostError, match="Another operator changes gpu-02"):
        run()
    assert [play.check for play in StandInPlay.seen] == [True, False, True]
