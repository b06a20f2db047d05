"""The history of hosts: who changed what and when. Each host keeps its own, for all operators; it is not trusted.

The playbooks write it (`plugins/action/host_visit.py`), and so do `cordon` and `uncordon`.
"""

from __future__ import annotations

import getpass
import importlib.util
import json
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.plays.provisioning import collection_folder
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_problem, last_line
from mixtral_run.fleet.untrusted import one_line, parse_json

HISTORY = "/var/log/mixtral-run/history.jsonl"
"""Log of a host. All users of the host can read it."""
MAX_BYTES = 1 << 19
"""The roles keep the log below half of this."""
MAX_VISITS, MAX_TASKS = 1000, 100
MAX_TEXT = 120
SHOWN_TASKS = 3
_READ = 'if [ ! -e "$1" ]; then exit 0; fi; tail -c "$2" -- "$1"'
APPEND = """
h="$2"; $s mkdir -p -m 755 "${h%/*}" && printf '%s\\n' "$3" |
    $s sh -c 'umask 022; [ ! -L "$1" ] || exit; exec 9<"${1%/*}"; if command -v flock >/dev/null; then flock 9; fi
        cat >>"$1" && if [ "$(wc -c <"$1")" -gt "$2" ]; then
            tail -c "$3" "$1" | sed 1d >"$1.$$.new" && mv "$1.$$.new" "$1"; fi' write "$h" LONGEST KEPT ||
    echo "$h cannot be written" >&2
""".replace("LONGEST", str(MAX_BYTES // 2)).replace("KEPT", str(MAX_BYTES // 4))
"""Part of a script that appends $3 to the history $2 with the command $s for root's rights. It never fails.

It takes the lock of the roles, which is on the folder, and cuts a long history as they do.
"""


@dataclass(frozen=True)
class Visit:
    """One run on a host. Texts are short and printable; None and empty: unknown."""

    at: str
    """Begin, UTC, ISO 8601."""
    by: str
    kit: str
    verb: str
    tags: tuple[str, ...]
    outcome: str
    """done, failed, or `no end`: it still runs, or was cut off."""
    failed: str = ""
    """Task that failed."""
    ended: str = ""
    num_changed: int | None = None
    changed: tuple[str, ...] = ()

    @property
    def what(self) -> str:
        """Return what was changed, in one line."""
        if self.outcome == "no end":
            return "runs still, or was cut off"
        failed = [f"failed at: {self.failed}"] if self.failed else []
        if self.num_changed is None:
            return "; ".join([*failed, "changes unknown"])
        more = [f"and {self.num_changed - SHOWN_TASKS} more"] if self.num_changed > SHOWN_TASKS else []
        return "; ".join([*failed, *self.changed[:SHOWN_TASKS], *more]) or "nothing"


@dataclass(frozen=True)
class HostHistory:
    """The visits of a host, the newest last. odd: number of lines that are not in their form."""

    name: str
    visits: tuple[Visit, ...] = ()
    odd: int = 0
    error: str | None = None


def operator() -> str:
    """Return the user and the name of this machine."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


def line_of(verb: str, changed: str) -> str:
    """Return the line for a change that is done in one step."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    values = {"at": now, "by": operator(), "kit": _kit_version(), "verb": verb, "state": "ended", "outcome": "done"}
    return json.dumps({**values, "tags": [], "failed": "", "num_changed": 1, "changed": [changed]}, ensure_ascii=True)


def _kit_version() -> str:
    """Return the version as the playbooks record it. Their plugins are no part of this package."""
    file = collection_folder() / "plugins/plugin_utils/kit_version.py"
    spec = importlib.util.spec_from_file_location("mixtral_run_kit_version", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.kit_version())


def read_histories(hosts: Sequence[Host], ssh: Ssh | None = None) -> list[HostHistory]:
    """Read the history of all hosts in parallel. A host that cannot be read has an `error`."""
    ssh = ssh or Ssh()
    return ssh.each(hosts, lambda host: _read(ssh, host))


def _read(ssh: Ssh, host: Host) -> HostHistory:
    try:
        answer = ssh.run(host, ["sh", "-c", _READ, "history", HISTORY, str(MAX_BYTES)])
    except HostError as error:
        return HostHistory(host.name, error=error.what)
    if answer.exit_code == 255:
        return HostHistory(host.name, error=connection_problem(host, answer.errors))
    if answer.exit_code:
        return HostHistory(host.name, error=one_line(last_line(answer.errors)) or f"exit code {answer.exit_code}")
    return history_of(host.name, answer.output)


def history_of(name: str, text: str) -> HostHistory:
    """Return the history in the text of a host's log. Lines that are not in their form are counted and left out."""
    visits: dict[str, Visit] = {}
    odd = 0
    lines = [line for line in text.split("\n") if line.strip()]
    for number, line in enumerate(lines):
        try:
            run, visit = _visit_of(parse_json(line))
        except (ValueError, TypeError, KeyError):
            # The first line of a long log is cut.
            odd += 0 if number == 0 and len(text) > MAX_BYTES // 2 else 1
            continue
        begun = visits.pop(run, None)
        if begun is not None and begun.outcome == "no end" and visit.outcome != "no end":
            visit = Visit(**{**vars(visit), "at": begun.at, "ended": visit.at})
        visits[run or f"line {number}"] = visit
    return HostHistory(name, tuple(visits.values())[-MAX_VISITS:], odd)


def _visit_of(values: Any) -> tuple[str, Visit]:
    """Return the run and the visit of a line. Raises ValueError, TypeError or KeyError for another form."""
    ended = {"began": False, "ended": True}[values["state"]]
    visit = Visit(
        at=_text(values["at"]), by=_text(values["by"]), kit=_text(values["kit"]), verb=_text(values["verb"]),
        tags=_texts(values["tags"]), outcome="no end",
    )  # fmt: skip
    run = _text(values.get("run", ""))
    if not ended:
        return run, visit
    number = values["num_changed"]
    if number is not None and (type(number) is not int or not 0 <= number <= 10**6):
        raise ValueError(number)
    more = {
        "outcome": {"done": "done", "failed": "failed"}[values["outcome"]],
        "failed": _text(values["failed"]),
        "num_changed": number,
        "changed": _texts(values["changed"]),
    }
    return run, Visit(**{**vars(visit), **more})


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return one_line(value, MAX_TEXT)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > MAX_TASKS:
        raise TypeError(value)
    return tuple(_text(each) for each in value)


COLUMNS = ("host", "when (UTC)", "who", "what", "changed", "kit")


def history_rows(histories: Sequence[HostHistory]) -> list[tuple[str, ...]]:
    """Return the rows of the table for a terminal, the newest visit of each host first."""
    rows: list[tuple[str, ...]] = []
    for host in histories:
        for visit in reversed(host.visits):
            mark = {"done": "✓", "failed": "✗"}.get(visit.outcome, "!")
            verb = " --tags ".join(filter(None, (visit.verb, ",".join(visit.tags))))
            rows.append((f"{mark} {host.name}", visit.at, visit.by, verb, visit.what, visit.kit))
        if host.error is not None:
            rows.append((f"✗ {host.name}", "", "", "", host.error, ""))
        elif not host.visits:
            rows.append((f"· {host.name}", "", "", "", "no record", ""))
        if host.odd:
            rows.append((f"! {host.name}", "", "", "", f"{host.odd} lines are not in the form of a record", ""))
    return rows


def to_json(histories: Sequence[HostHistory]) -> str:
    """Return the histories as a JSON list."""
    return json.dumps([asdict(host) for host in histories], indent=2, ensure_ascii=False)
