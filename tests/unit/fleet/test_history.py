"""The history of a host: what a damaged or hostile host may have written there never breaks the operator's view."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from mixtral_run.cli.commands.status import status
from mixtral_run.fleet import history as module
from mixtral_run.fleet.history import MAX_BYTES, history_of, history_rows
from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.ssh.connection import Answer

BEGAN = {
    "run": "1", "at": "2026-11-30T10:00:00Z", "by": "ann@laptop", "kit": "0.2.0+abc", "verb": "bootstrap",
    "tags": ["docker", "swap"], "state": "began",
}  # fmt: skip
ENDED = {
    **BEGAN, "at": "2026-11-30T10:07:00Z", "state": "ended", "outcome": "done", "failed": "", "num_changed": 4,
    "changed": ["docker · a", "docker · b", "swap · c", "swap · d"],
}  # fmt: skip


def text_of(*entries: dict[str, Any]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def test_begin_and_end_are_one_visit() -> None:
    cut = {**BEGAN, "run": "2", "by": "bob@desk"}
    failed = {**ENDED, "run": "3", "outcome": "failed", "failed": "docker · b", "num_changed": 0, "changed": []}
    found = history_of("gpu-01", text_of(BEGAN, cut, ENDED, {**cut, "run": "3"}, failed))
    assert [(visit.by, visit.at, visit.ended) for visit in found.visits] == [
        ("bob@desk", "2026-11-30T10:00:00Z", ""),
        ("ann@laptop", "2026-11-30T10:00:00Z", "2026-11-30T10:07:00Z"),
        ("ann@laptop", "2026-11-30T10:00:00Z", "2026-11-30T10:07:00Z"),
    ]
    assert history_rows([found]) == [
        ("✗ gpu-01", "2026-11-30T10:00:00Z", "ann@laptop", "bootstrap --tags docker,swap",
         "failed at: docker · b", "0.2.0+abc"),
        ("✓ gpu-01", "2026-11-30T10:00:00Z", "ann@laptop", "bootstrap --tags docker,swap",
         "docker · a; docker · b; swap · c; and 1 more", "0.2.0+abc"),
        ("! gpu-01", "2026-11-30T10:00:00Z", "bob@desk", "bootstrap --tags docker,swap",
         "runs still, or was cut off", "0.2.0+abc"),
    ]  # fmt: skip


def test_nothing_changed_is_not_unknown() -> None:
    nothing = history_of("a", text_of({**ENDED, "num_changed": 0, "changed": []}))
    unknown = history_of("a", text_of({**ENDED, "num_changed": None, "changed": []}))
    assert [each.visits[0].what for each in (nothing, unknown)] == ["nothing", "changes unknown"]


@pytest.mark.parametrize(
    "line",
    [
        "null", "[]", "{}", "[" * 5000, "NaN", "x\x00y",
        json.dumps({**BEGAN, "by": 3}), json.dumps({**BEGAN, "state": "x"}),
        json.dumps({**BEGAN, "state": []}), json.dumps({**ENDED, "num_changed": True}),
        json.dumps({**ENDED, "num_changed": -1}), json.dumps({**ENDED, "changed": "abc"}),
        json.dumps({**ENDED, "changed": ["a"] * 101}), json.dumps({**ENDED, "outcome": {}}),
        json.dumps({**BEGAN, "tags": [None]}), json.dumps({**BEGAN, "run": 1}),
    ],
)  # fmt: skip
def test_an_odd_line_is_counted_and_the_others_are_shown(line: str) -> None:
    found = history_of("gpu-01", f"{line}\n{text_of(ENDED)}")
    assert (len(found.visits), found.odd) == (1, 1)
    assert history_rows([found])[-1][4] == "1 lines are not in the form of a record"


def test_texts_are_short_and_printable() -> None:
    evil = "\x1b]0;title\x07\x1b[2Jred\r\nnext" + "x" * 9000
    entry = {**ENDED, **dict.fromkeys(("by", "kit", "verb", "failed", "at"), evil), "changed": [evil], "tags": [evil]}
    found = history_of("gpu-01", text_of(entry))
    for row in history_rows([found]):
        for cell in row:
            assert cell.isprintable() and len(cell) < 500
    assert "\\u001b" not in module.to_json([found])


def test_a_cut_first_line_of_a_long_log_is_not_odd() -> None:
    text = text_of(*[{**ENDED, "run": str(number)} for number in range(3000)])[-MAX_BYTES + 17 :]
    found = history_of("gpu-01", text)
    assert found.odd == 0 and len(found.visits) == module.MAX_VISITS and found.visits[-1].by == "ann@laptop"


def test_status_shows_all_hosts_and_fails_for_one_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "gpu-01": Answer(0, text_of(ENDED), ""), "gpu-02": Answer(0, "", ""), "gpu-03": Answer(1, "", "tail: no\x07"),
    }  # fmt: skip

    class StandInSsh:
        def each(self, hosts: Any, work: Any) -> list[Any]:
            return [work(host) for host in hosts]

        def run(self, host: Host, command: Any) -> Answer:
            assert command[-2] == "/var/log/mixtral-run/history.jsonl"
            return answers[host.name]

    monkeypatch.setattr(module, "Ssh", StandInSsh)
    monkeypatch.setattr("mixtral_run.fleet.selection.hosts_of", lambda names, *_: tuple(map(parse_host, names)))
    shown = CliRunner().invoke(status, [*answers, "--history", "--json"])
    values = json.loads(shown.stdout)
    assert [len(each["visits"]) for each in values] == [1, 0, 0] and values[2]["error"]
    assert values[0]["visits"][0]["changed"] == ENDED["changed"]
    assert "gpu-03" in str(shown.exception)
    table = CliRunner().invoke(status, ["gpu-02", "--history"]).stdout
    assert "no record" in table
