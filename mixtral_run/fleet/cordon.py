"""Hosts that take no new job: who set a host apart, when and why. The record is on the host, for all operators."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_run.errors import HostError
from mixtral_run.fleet.history import APPEND, HISTORY, line_of, operator
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line
from mixtral_run.fleet.untrusted import one_line, parse_json

CORDON_FILE = "/var/lib/mixtral-run/cordon.json"
"""Record of a cordoned host. All users of the host can read it."""
MAX_REASON = 200

_AS_ROOT = """
if [ "$(id -u)" = 0 ]; then s=; elif sudo -n true 2>/dev/null; then s='sudo -n'
else echo "$(id -un) is not root, and sudo asks for a password" >&2; exit 77; fi
if [ -e "$1" ]; then head -c 4000 "$1"; fi
"""
"""Script that prints the record in $1. $s is then the command for root's rights."""
_CORDON = (
    _AS_ROOT
    + """
$s mkdir -p -m 755 "${1%/*}" || exit
$s sh -c 'umask 022; cat >"$1.$$.new" && mv "$1.$$.new" "$1"' write "$1" || exit
"""
    + APPEND
)
_UNCORDON = _AS_ROOT + '$s rm -f "$1" || exit\n' + APPEND


@dataclass(frozen=True)
class Cordon:
    """Record of a cordoned host. at: UTC, ISO 8601."""

    reason: str
    by: str
    at: str

    def __str__(self) -> str:
        # The health watch keeps the beginning of a long reason.
        is_cut = len(self.reason) >= MAX_REASON and not self.reason.endswith("…")
        return f"cordoned by {self.by} since {self.at}: {self.reason}{' …' * is_cut}"


def parse_cordon(text: str) -> Cordon | None:
    """Return the record of a host, or None for an empty text. A record in another form cordons the host as well."""
    if not text.strip():
        return None
    try:
        values = parse_json(text)
    except ValueError:
        values = None
    return cordon_of(values)


def cordon_of(values: object) -> Cordon:
    """Return the record that JSON values describe; what is missing or no text is unknown."""
    found = values if isinstance(values, dict) else {}
    texts = {name: found.get(name) for name in ("reason", "by", "at")}
    return Cordon(**{name: one_line(text) if isinstance(text, str) else "unknown" for name, text in texts.items()})


def cordon_error(host: Host, record: str) -> HostError:
    """Return the error for a cordoned host. record: text of its file; one that cannot be read cordons the host too."""
    return HostError(
        f"{host.name} takes no jobs: it is cordoned.",
        where=host.target,
        found=str(parse_cordon(record) or cordon_of(None)),
        next_command=f"another host, such as --on any; or mixtral-run uncordon {host.name}",
    )


def cordon(hosts: Sequence[Host], reason: str, ssh: Ssh | None = None) -> list[Cordon | None]:
    """Cordon hosts, and return the record that each had before.

    Raises HostError with each host that could not be cordoned; the others are.
    """
    record = Cordon(one_line(reason, MAX_REASON), operator(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
    data = json.dumps(dataclasses.asdict(record), ensure_ascii=False) + "\n"
    line = line_of("cordon", f"takes no jobs: {record.reason}")
    return _on_each(hosts, _CORDON, "cordoned", ssh or Ssh(), line, data.encode())


def uncordon(hosts: Sequence[Host], ssh: Ssh | None = None) -> list[Cordon | None]:
    """Let hosts take jobs again, and return the record that each had. Raises HostError as `cordon` does."""
    return _on_each(hosts, _UNCORDON, "uncordoned", ssh or Ssh(), line_of("uncordon", "takes jobs"))


def _on_each(
    hosts: Sequence[Host], script: str, what: str, ssh: Ssh, line: str, stdin: bytes | None = None
) -> list[Cordon | None]:
    def work(host: Host) -> Cordon | HostError | None:
        answer = ssh.run(host, ["sh", "-c", script, what, CORDON_FILE, HISTORY, line], stdin=stdin)
        if answer.exit_code == 255:
            return connection_error(host, answer.errors)
        if answer.exit_code:
            return HostError(
                f"{host.name} was not {what}.",
                where=f"{host.target}: {CORDON_FILE}",
                found=last_line(answer.errors) or f"exit code {answer.exit_code}",
            )
        return parse_cordon(answer.output)

    found = ssh.each(hosts, work)
    errors = [each for each in found if isinstance(each, HostError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        raise HostError(f"Not all hosts were {what}.", problems=[str(each) for each in errors])
    return [each for each in found if not isinstance(each, HostError)]
