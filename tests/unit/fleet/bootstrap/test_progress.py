"""The state of hosts after the events of a recorded play (see tests/hosts/playbooks/small.yml)."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.bootstrap.progress import FleetProgress, Notice, Phase
from mixtral_run.fleet.bootstrap.view import PlainView, duration, make_view, progress_table, summary, where

RECORDED = Path(__file__).with_name("recorded_events.jsonl")


@pytest.fixture
def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDED.read_text().splitlines()]


def folded(events: list[dict[str, Any]]) -> tuple[FleetProgress, list[Notice]]:
    progress = FleetProgress(["gpu-01", "gpu-02"])
    return progress, [notice for event in events for notice in progress.fold(event)]


def test_the_end_of_a_play(events: list[dict[str, Any]]) -> None:
    progress, notices = folded(events)
    good, bad = progress.hosts["gpu-01"], progress.hosts["gpu-02"]
    assert (good.phase, good.changed, good.skipped, good.failure) == (Phase.DONE, 1, 2, None)
    assert bad.phase is Phase.FAILED
    assert bad.failure is not None
    assert bad.failure.task == "Fail in the middle"
    assert bad.failure.message == "E: Could not get lock /var/lib/dpkg/lock-frontend"
    assert progress.bad == [bad]
    assert sorted(notice.host for notice in notices if notice.kind == "changed") == ["gpu-01", "gpu-02"]
    assert any(notice.kind == "diff" and "+host gpu-01" in notice.text for notice in notices)


def test_before_the_end_a_host_shows_its_task(events: list[dict[str, Any]]) -> None:
    start = next(i for i, each in enumerate(events) if each["event_data"].get("task") == "Take a while")
    progress, _ = folded(events[: start + 2])
    host = progress.hosts["gpu-01"]
    assert (host.phase, host.task) == (Phase.RUNNING, "Take a while")
    progress.stop()
    assert host.phase is Phase.STOPPED


def test_what_a_rescue_mends_is_no_failure(events: list[dict[str, Any]]) -> None:
    progress, notices = folded(events)
    assert any("Fail inside a block" in notice.text for notice in notices)
    assert progress.hosts["gpu-01"].failures == []


def test_an_ignored_failure_is_none(events: list[dict[str, Any]]) -> None:
    _, notices = folded(events)
    assert not any("Ignore a failure" in notice.text for notice in notices if notice.kind == "failed")


def test_a_host_that_no_play_reached_is_not_done() -> None:
    progress = FleetProgress(["gpu-01", "gpu-02"])
    progress.fold({"event": "playbook_on_stats", "event_data": {"processed": {"gpu-01": 1}, "ok": {"gpu-01": 3}}})
    assert [host.phase for host in progress.hosts.values()] == [Phase.DONE, Phase.WAITING]


def test_the_summary_names_error_remedy_log_and_retry(events: list[dict[str, Any]]) -> None:
    progress, _ = folded(events)
    text = summary(progress, seconds=75, log=Path("/state/log"), retry="mixtral-run bootstrap --retry", check=False)
    assert "✗ gpu-02: Fail in the middle" in text
    assert "unattended-upgrades" in text
    assert "1 failed, 1 done in 1:15" in text or "1 done, 1 failed in 1:15" in text
    assert "log:   /state/log" in text
    assert text.rstrip().endswith("retry: mixtral-run bootstrap --retry")


def test_a_warning_of_many_hosts_is_reported_once() -> None:
    progress = FleetProgress([f"gpu-{number:02}" for number in range(50)])
    for name in progress.hosts:
        data = {"host": name, "task": "Look", "res": {"warnings": ["the clock is slow", f"{name}: time sync: none"]}}
        progress.fold({"event": "runner_on_ok", "event_data": data})
    text = summary(progress, seconds=1, log=None, retry=None, check=False)
    reported, named = (line for line in text.splitlines() if line.startswith("! "))
    assert reported.startswith("! gpu-00, gpu-01, ")
    assert reported.endswith(" and 42 more: the clock is slow")
    # A module that names the host itself gives each host another warning.
    assert named.endswith(" and 42 more: time sync: none")


def test_users_and_owners_that_changed_are_named_where_they_change_and_at_the_end() -> None:
    progress = FleetProgress(["gpu-01", "gpu-02"])
    for name in progress.hosts:
        result = {"changed": True, "shown": ["added ops to group docker", "took ann out of group docker"]}
        data = {"host": name, "role": "docker", "task": "Start", "res": result}
        (notice,) = progress.fold({"event": "runner_on_ok", "event_data": data})
        assert notice.text == "docker · Start: added ops to group docker, took ann out of group docker"
    assert progress.hosts["gpu-01"].changed_tasks == ["docker · Start"]
    text = summary(progress, seconds=1, log=None, retry=None, check=False)
    assert text.count(f"~ gpu-01, gpu-02: {notice.text}") == 1


def test_plain_lines_tell_changes_failures_and_ends(events: list[dict[str, Any]]) -> None:
    stream, progress = io.StringIO(), FleetProgress(["gpu-01", "gpu-02"])
    view = PlainView(progress, stream)
    for event in events:
        view.update(progress.fold(event))
    lines = stream.getvalue().splitlines()
    assert "~ gpu-01: changed · Write a file" in lines
    assert any(line.startswith("✗ gpu-02: failed · Fail in the middle: E: Could not get lock") for line in lines)
    assert any(line.startswith("✓ gpu-01: done, 1 changed") for line in lines)
    assert not any("+host" in line for line in lines)


def test_plain_lines_of_many_hosts_do_not_look_at_all_hosts_at_each_event() -> None:
    looks = 0

    class CountedHosts(dict[str, Any]):
        def values(self) -> Any:
            nonlocal looks
            looks += 1
            return super().values()

    progress = FleetProgress([f"gpu-{number:04}" for number in range(1000)])
    progress.hosts = CountedHosts(progress.hosts)
    view = PlainView(progress, io.StringIO())
    for name in progress.hosts:
        view.update(progress.fold({"event": "runner_on_ok", "event_data": {"host": name, "task": "x", "res": {}}}))
    assert looks == 0
    names = dict.fromkeys(progress.hosts, 1)
    view.update(progress.fold({"event": "playbook_on_stats", "event_data": {"processed": names}}))
    assert isinstance(view.stream, io.StringIO) and view.stream.getvalue().count("done, 0 changed") == 1000


def test_a_table_of_many_hosts_fits_and_shows_failures_first() -> None:
    from rich.console import Console

    progress = FleetProgress([f"gpu-{number:02}" for number in range(50)])
    progress.unreachable("gpu-49", "does not answer")
    for number in range(30):
        progress.hosts[f"gpu-{number:02}"].phase = Phase.DONE
    console = Console(file=io.StringIO(), width=100, height=24)
    console.print(progress_table(progress, 22))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) <= 22
    assert "gpu-49" in lines[1]
    assert "30 done" in lines[-1]


def test_a_line_tells_role_task_time_and_counts() -> None:
    from rich.console import Console

    progress = FleetProgress(["gpu-01"])
    for event, role, task in (("ok", "preflight", "Look"), ("ok", "docker", "Add"), ("start", "docker", "Install")):
        data = {"host": "gpu-01", "role": role, "task": task, "res": {"changed": task == "Add"}}
        progress.fold({"event": f"runner_on_{event}", "event_data": data})
    progress.hosts["gpu-01"].task_since = time.time() - 200
    console = Console(file=io.StringIO(), width=100, height=24)
    console.print(progress_table(progress, 22))
    heading, line = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert heading.split() == ["host", "role", "task", "elapsed", "changed/ok"]
    assert re.fullmatch(r"… gpu-01 +docker +Install +3:2\d +1/2", line.rstrip())


def test_secrets_of_no_log_tasks_are_not_in_messages(events: list[dict[str, Any]]) -> None:
    progress = FleetProgress(["gpu-01"])
    progress.fold(
        {
            "event": "runner_on_failed",
            "event_data": {"host": "gpu-01", "task": "Token", "res": {"censored": "the output has been hidden"}},
        }
    )
    failure = progress.hosts["gpu-01"].failure
    assert failure is not None
    assert "its output is hidden" in failure.message


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (75, "1:15"), (3723, "1:02:03")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_failure_that_a_play_tells_again_at_its_end_is_the_first_one() -> None:
    progress = FleetProgress({"gpu-01-2222": "gpu-01:2222"})
    rows = (("docker", "Install the engine", "E: broken"), ("", "Fail the hosts", "Install the engine: E: broken"))
    reported = []
    for role, task, message in rows:
        data = {"host": "gpu-01-2222", "role": role, "task": task, "res": {"msg": message}}
        reported += progress.fold({"event": "runner_on_failed", "event_data": data})
    end = {"failures": {"gpu-01-2222": 1}, "rescued": {"gpu-01-2222": 1}, "processed": {"gpu-01-2222": 1}}
    progress.fold({"event": "playbook_on_stats", "event_data": end})
    (host,) = progress.hosts.values()
    assert host.phase is Phase.FAILED
    assert host.failure is not None
    assert (host.failure.role, host.failure.task) == ("docker", "Install the engine")
    assert [notice.host for notice in reported] == ["gpu-01:2222"]


def _event(kind: str, host: str = "gpu-01", task: str = "Write it", **result: Any) -> dict[str, Any]:
    return {"event": kind, "event_data": {"host": host, "role": "x", "task": task, "res": result}}


def _end(**counts: dict[str, int]) -> dict[str, Any]:
    return {"event": "playbook_on_stats", "event_data": {"processed": {"gpu-01": 1}, **counts}}


def test_a_hidden_task_that_changed_something_counts_as_changed() -> None:
    hidden = _event("runner_on_ok", censored="the output has been hidden")
    progress, _ = folded([_event("runner_on_ok", task="Other", changed=True), hidden, _end(changed={"gpu-01": 2})])
    host = progress.hosts["gpu-01"]
    assert (host.changed, host.changed_tasks) == (2, ["x · Other", "x · Write it"])
    progress, _ = folded([hidden, _end(changed={})])
    assert (progress.hosts["gpu-01"].changed, progress.hosts["gpu-01"].changed_tasks) == (0, [])


NO_RESULT = "Module result deserialization failed: No start of json char found"


def test_what_sudo_said_is_shown_instead_of_the_missing_result() -> None:
    said = "sudo: sorry, you must have a tty to run sudo"
    failed = _event("runner_on_failed", msg=NO_RESULT, module_stdout="", module_stderr=said + "\n")
    deferred = _event("runner_on_failed", task="Fail", msg=f"Write it: {NO_RESULT}")
    progress, notices = folded([failed, deferred, _end(failures={"gpu-01": 1}, rescued={"gpu-01": 1})])
    assert progress.hosts["gpu-01"].failure is not None
    assert progress.hosts["gpu-01"].failure.message == said
    assert len([notice for notice in notices if notice.kind == "failed"]) == 1
    text = summary(progress, seconds=1, log=None, retry=None, check=False)
    assert "requiretty" in text and "visudo" in text and NO_RESULT not in text


def test_a_start_up_file_that_prints_is_named_as_the_cause() -> None:
    printed = '{"greeting": "welcome"}\n{"failed": true, "invocation": {"module_args": {}}}'
    failed = _event("runner_on_failed", msg=NO_RESULT.replace("No start", "Extra data"), module_stdout=printed)
    progress, _ = folded([failed, _end(failures={"gpu-01": 1})])
    assert progress.hosts["gpu-01"].failure is not None
    message = progress.hosts["gpu-01"].failure.message
    assert '{"greeting": "welcome"}' in message and "~/.bashrc" in message and "next:" in message


def test_a_copy_from_host_to_host_is_shown_with_its_source() -> None:
    progress, out = FleetProgress(["gpu-01"]), io.StringIO()
    start = {"event": "runner_on_start", "event_data": {"host": "gpu-01", "role": "x", "task": "Take it"}}
    note = "org/model from gpu-02 (1 of 2 hosts have it, 1 round to go)"
    notices = progress.fold(start) + progress.fold(_event("runner_on_ok", spread_note=note, msg=note))
    progress.fold(start)
    PlainView(progress, out).update(notices)
    assert out.getvalue() == f"← gpu-01: {note}\n"
    assert where(progress.hosts["gpu-01"]) == f"x · Take it · {note}"
    progress.fold({"event": "runner_on_start", "event_data": {"host": "gpu-01", "role": "y", "task": "Next"}})
    assert where(progress.hosts["gpu-01"]) == "y · Next"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_a_role_replaces_is_printed_when_it_is_known_and_again_at_the_end() -> None:
    progress, live, plain = FleetProgress(["gpu-01"]), Terminal(), io.StringIO()
    words = "found docker.io 20; it goes"
    result = {"warnings": [f"gpu-01: engine: {words}"], "announcements": [f"before anything is changed: {words}"]}
    notices = progress.fold(_event("runner_on_ok", **result))
    assert [notice.kind for notice in notices] == ["warning", "announcement"]
    for stream in (live, plain):
        view = make_view(progress, stream)
        with view:
            view.update(notices)
    assert f"! gpu-01: before anything is changed: {words}" in live.getvalue().replace("\r", "")
    assert plain.getvalue() == f"! gpu-01: warning · engine: {words}\n"
    assert words in summary(progress, seconds=1, log=None, retry=None, check=True)


def test_a_source_that_is_lost_does_not_make_the_host_unreachable() -> None:
    """The events of a delegated task are those of the host that delegates; only the printed line names the other."""
    progress = FleetProgress(["gpu-01"])
    lost = _event("runner_on_unreachable", msg="Connection timed out", unreachable=True)
    lost["stdout"] = "fatal: [gpu-01 -> gpu-02(10.0.0.2)]: UNREACHABLE! => ..."
    (notice,) = progress.fold(lost)
    progress.fold(_end(ignored={"gpu-01": 1}))
    assert notice.kind == "warning" and progress.hosts["gpu-01"].phase is Phase.DONE and not progress.bad
    progress = FleetProgress(["gpu-01"])
    lost["stdout"] = "fatal: [gpu-01]: UNREACHABLE! => ..."
    progress.fold(lost)
    progress.fold(_end(dark={"gpu-01": 1}))
    assert [host.phase for host in progress.bad] == [Phase.UNREACHABLE]
