"""A hostile or damaged host costs its own row: the others are shown, and no control sequence reaches the terminal."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import root
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import HostError
from mixtral_run.fleet.bootstrap.progress import FleetProgress
from mixtral_run.fleet.hosts import parse_host, parse_hosts
from mixtral_run.fleet.jobs.fetch import fetch, fetch_job
from mixtral_run.fleet.jobs.host_facts import parse_facts
from mixtral_run.fleet.jobs.job_log import JobFollower, show_logs
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.jobs.jobs import RunningJob, list_jobs, start
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.status.page import page
from mixtral_run.fleet.status.read_fleet import HostStatus, read_fleet, status_from, summary_rows, to_json
from tests.unit.fleet.hostile_tar import CASES, FILE, PEFT, stream

HOSTILE = Path(__file__).with_name("hostile")
GOOD_STATUS, GOOD_ROWS = HOSTILE / "status_good.json", HOSTILE / "rows_good.txt"
BOTH = parse_hosts(["good", "evil"])
CONTROL = "\x1b[2J\x1b]0;owned\x07"


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return a function that sets the answers of the hosts good and evil."""
    monkeypatch.setenv("PATH", f"{HOSTILE}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def answer(good: Path, evil: Path | str | bytes, log: str | None = None) -> None:
        if not isinstance(evil, Path):
            (tmp_path / "evil").write_bytes(evil.encode() if isinstance(evil, str) else evil)
            evil = tmp_path / "evil"
        monkeypatch.setenv("GOOD", str(good))
        monkeypatch.setenv("EVIL", str(evil))
        if log is not None:
            (tmp_path / "log").write_text(log, newline="")
            monkeypatch.setenv("LOG", str(tmp_path / "log"))

    return answer


def good_values() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(GOOD_STATUS.read_text())
    return values


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value within JSON values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, below in items for each in paths_of(below, (*path, key)))]


def replaced(path: tuple[Any, ...], value: Any) -> Any:
    values: Any = good_values()
    place = values
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
        return values
    return value


ODD = sorted(HOSTILE.glob("status_*_odd.json")) + sorted(HOSTILE.glob("status_*_list*.json"))
TEXTS = ["", "no JSON", "[]", "null", "1", '{"gpus": []}', "[" * 6000 + "]" * 6000, '{"a":' * 6000 + "1" + "}" * 6000]


@pytest.mark.parametrize("evil", [*ODD, *TEXTS], ids=lambda each: each.name if isinstance(each, Path) else each[:12])
def test_an_odd_answer_to_status_costs_one_row(answers: Any, evil: Path | str) -> None:
    answers(GOOD_STATUS, evil)
    good, odd = read_fleet(BOTH)
    assert (good.name, good.error, good.gpu_model, good.models) == ("good", None, "H200", ("m",))
    assert odd.error is not None and odd.reachable and "not in the expected form" in odd.error
    assert "H200" in page([good, odd]) and len(summary_rows([good, odd])[1]) == 2
    assert [each["name"] for each in json.loads(to_json([good, odd]))] == ["good", "evil"]


def test_the_cases_are_there() -> None:
    assert len(ODD) == 4


def test_the_good_answer_is_good() -> None:
    status = status_from(parse_host("good"), good_values())
    assert status.error is None and status.num_gpus == 1 and status.jobs == ("finetune-1 (finetune, 2 hours ago)",)


@pytest.mark.parametrize("value", [None, True, -1, 1e300, 10**30, "text", [], [[]], {}, {"a": {}}, [None], ["a", 1]])
def test_any_value_in_any_place_is_read_or_refused(value: Any) -> None:
    for path in paths_of(good_values()):
        try:
            status = status_from(parse_host("evil"), replaced(path, value))
        except ValueError as error:
            assert str(error).isprintable() and len(str(error)) < 300
            continue
        # A state that is read can be shown and compared.
        assert page([status]) and summary_rows([status]) and hash(status) and json.loads(to_json([status]))


def test_a_missing_reading_is_named() -> None:
    values = good_values()
    del values["engine"]["cdi_devices"]
    with pytest.raises(ValueError, match=r"engine: cdi_devices missing"):
        status_from(parse_host("evil"), values)
    with pytest.raises(ValueError, match=r"models\[1\]: expected text; found 1"):
        status_from(parse_host("evil"), json.loads((HOSTILE / "status_models_odd.json").read_text()))


def test_status_shows_no_control_sequence(answers: Any, tmp_path: Path) -> None:
    for path in paths_of(good_values()):
        place: Any = good_values()
        for key in path:
            place = place[key]
        if not isinstance(place, str):
            continue
        answers(GOOD_STATUS, json.dumps(replaced(path, f"{CONTROL}<b>\ud800")))
        done = CliRunner().invoke(root, ["status", "good", "evil", "--html", str(tmp_path / "page.html")])
        assert done.exit_code == 0, done.output
        assert not any(character < " " and character != "\n" for character in done.output)
        html = (tmp_path / "page.html").read_text()
        assert "\x1b" not in html and "\x07" not in html and "<b>\ufffd" not in html


@pytest.mark.parametrize(
    "line",
    [
        (HOSTILE / "rows_times_odd.txt").read_text().strip(),
        "finetune-1\tfinetune\texited\t0\tfalse\t2026-01-01T00:00:00.0Z\t/x\t" + "9" * 5000,
        "finetune-1\tfinetune\texited\t" + "9" * 5000 + "\tfalse\t2026-01-01T00:00:00.0Z\t/x\t1",
        "finetune-1\tfinetune\texited\t0\tfalse\t2026-01-01T00:00:00.0Z\trelative/..\t1",
        "-rm\tfinetune\texited\t0\tfalse\t2026-01-01T00:00:00.0Z\t/x\t1",
        "one cell",
        CONTROL + "finetune",
    ],
)
def test_an_odd_row_of_jobs_costs_one_row(answers: Any, line: str) -> None:
    answers(GOOD_ROWS, f"{GOOD_ROWS.read_text()}{line}\n")
    rows, (error,) = list_jobs(BOTH)
    assert sorted((row.host.name, row.job) for row in rows) == [("evil", "finetune-1"), ("good", "finetune-1")]
    assert "evil does not report all its jobs" in str(error) and "\x1b" not in str(error) and len(str(error)) < 500
    done = CliRunner().invoke(root, ["jobs", "good", "evil"])
    assert "finetune-1" in done.output and isinstance(done.exception, HostError)


def facts(**changed: str | None) -> str:
    lines = dict(line.split("=", 1) for line in (HOSTILE / "facts_image_lost.txt").read_text().splitlines())
    del lines['im"age']
    lines |= {"image": "1", **{key: value for key, value in changed.items() if value is not None}}
    return "\n".join(f"{key}={value}" for key, value in lines.items() if changed.get(key, "") is not None)


@pytest.mark.parametrize(
    "changed",
    [
        {"image": None}, {"address": None}, {"uid": "-1"}, {"uid": "١"}, {"gid": "9" * 30}, {"gpus": "many"},
        {"docker": "sh -c evil"}, {"folder": "relative"}, {"kernels": ""}, {"address": "evil.example"},
        {"address": "1.2.3.4:1"}, {"interface": "eth0 x"}, {"cdi": "yes"},
        {"cordon": None}, {"cordon": "0"}, {"rdma": "mlx5_0 --privileged"}, {"bridges": None}, {"rdma_group": "-1"},
    ],
)  # fmt: skip
def test_odd_facts_start_nothing(answers: Any, changed: dict[str, str | None]) -> None:
    parse_facts(facts())
    with pytest.raises(ValueError, match=next(iter(changed))):
        parse_facts(facts(**changed))


def test_a_job_on_a_host_with_odd_facts_fails_in_words(answers: Any) -> None:
    answers(GOOD_STATUS, HOSTILE / "facts_image_lost.txt")
    config = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)
    with pytest.raises(HostError, match="evil cannot run jobs: its answer is not in the expected form") as caught:
        start("finetune", config, JobOptions(on=("evil",), detach=True))
    assert caught.value.found == "no value of image"


LOG = f"{CONTROL}one\n\ttwo ✓ 45 % █▌ |\r\nthree\rgood | four\n"


def test_logs_keep_their_text_and_lose_control_sequences(answers: Any) -> None:
    answers(GOOD_ROWS, GOOD_ROWS, LOG)
    out = io.StringIO()
    show_logs(list_jobs([parse_host("evil")])[0], out=out, err=io.StringIO())
    assert out.getvalue() == "one\n\ttwo ✓ 45 % █▌ |\nthree\ngood | four\n"


def test_a_redrawn_line_does_not_pass_for_that_of_another_host(answers: Any) -> None:
    answers(GOOD_ROWS, GOOD_ROWS, "2026-01-01T00:00:00.000000001Z three\rgood | four\n")
    out = io.StringIO()
    JobFollower(RunningJob("finetune-1", "finetune", BOTH), out=out, err=io.StringIO()).follow()
    assert sorted(out.getvalue().splitlines()) == [
        "evil | good | four",
        "evil | three",
        "good | good | four",
        "good | three",
    ]


def test_messages_of_ssh_lose_control_sequences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nprintf 'out\\033[31m\\n'; printf 'why\\033]0;x\\007\\n' >&2; exit 3\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answer = Ssh(tmp_path / "known_hosts").run(parse_host("evil"), ["true"])
    assert (answer.output, answer.errors) == ("out\n", "why\n")
    with pytest.raises(HostError) as caught, Ssh(tmp_path / "known_hosts").receive(parse_host("evil"), ["true"]):
        pass
    assert caught.value.found == "why"


def test_fetch_takes_a_plain_folder(answers: Any, tmp_path: Path) -> None:
    answers(GOOD_ROWS, stream([PEFT, ("peft/a", FILE, b"x")]))
    said: list[str] = []
    assert fetch_job("evil:/checkpoints/peft", tmp_path, say=said.append) == [tmp_path / "peft"]
    assert (tmp_path / "peft/a").read_bytes() == b"x" and said[1:] == ["  1 file, 1 byte from evil"]
    assert re.match(r"rsync is not installed (here|on evil): this fetch begins anew if it is interrupted\.$", said[0])


@pytest.mark.parametrize("case", [*CASES, "garbage", "cut off"])
def test_fetch_writes_nothing_of_a_hostile_folder(answers: Any, tmp_path: Path, case: str) -> None:
    data = {"garbage": b"no tar at all" * 100, "cut off": stream([PEFT, ("peft/a", FILE, b"x")])[:700]}.get(case)
    answers(GOOD_ROWS, stream(CASES[case]) if data is None else data)
    (tmp_path / "here").mkdir()
    before = {path for path in tmp_path.rglob("*") if "state" not in path.parts}
    done = CliRunner().invoke(root, ["fetch", "evil:/checkpoints/peft", str(tmp_path / "here")])
    assert isinstance(done.exception, HostError) and str(done.exception).replace("\n", "").isprintable()
    assert {path for path in tmp_path.rglob("*") if "state" not in path.parts} == before


def test_fetch_does_not_read_what_is_sent_after_the_archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(stream([("peft", FILE, b"x")]))
    no_rsync = 'case "$*" in *"rsync --version"*) exit;; esac'
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{no_rsync}\ncat '{tmp_path}/archive' /dev/zero\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(HostError, match="sent more than was asked for"):
        fetch(parse_host("evil"), "/checkpoints/peft", tmp_path / "peft", Ssh(tmp_path / "known_hosts"))
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("output", ["/x/..", "/", "/x/a\x1b[31m"])
def test_the_name_of_a_jobs_output_is_not_trusted(answers: Any, tmp_path: Path, output: str) -> None:
    answers(GOOD_ROWS, GOOD_ROWS.read_text().replace("\t/x\t", f"\t{output}\t"))
    with pytest.raises(HostError):
        fetch_job("finetune-1", tmp_path, on=("evil",))


def test_a_message_of_a_play_loses_control_sequences() -> None:
    progress = FleetProgress(["evil"])
    failed = {"host": "evil", "task": "Look", "res": {"msg": f"{CONTROL}broken", "warnings": [f"{CONTROL}careful"]}}
    notices = progress.fold({"event": "runner_on_failed", "event_data": failed})
    assert [notice.text for notice in notices] == ["careful", "Look: broken"]
    assert progress.hosts["evil"].failure is not None and progress.hosts["evil"].failure.message == "broken"


@pytest.mark.parametrize("odd", [5, True, "abc", {"a": 1}])
def test_lists_of_a_result_that_are_none_change_nothing(odd: object) -> None:
    progress = FleetProgress(["evil"])
    result = {"changed": True, "warnings": odd, "announcements": odd, "shown": odd}
    notices = progress.fold(
        {"event": "runner_on_ok", "event_data": {"host": "evil", "role": "x", "task": "Look", "res": result}}
    )
    assert [notice.text for notice in notices] == ["x · Look"]


def test_an_odd_state_has_a_row_on_the_page() -> None:
    assert "! unreadable" in page([HostStatus("evil", reachable=True, error="its answer is not in the expected form")])
