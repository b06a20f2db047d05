"""Translation of ssh's error messages into errors with a cause and a next command."""

from __future__ import annotations

import re
import shlex

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.untrusted import one_line


def connection_error(host: Host, errors: str) -> HostError:
    """Return the error for a failed connection, with its cause and the next command."""
    found = last_line(errors) or "ssh ended without a message"
    if is_changed_key(errors):
        # ssh prints nothing after its own complaint about the host's key. If a lost connection follows, the complaint
        # comes from the ssh process that connects to the jump host.
        if re.search(_DROPPED, errors, re.I | re.M):
            return _changed_jump_host(host, errors)
        return HostError(
            f"The host key of {host.name} has changed: the host was reimaged, or somebody intercepts the connection.",
            where=host.target,
            expected="the key recorded at first contact",
            found=_fingerprint(errors),
            next_command="if it was reimaged: "
            f"mixtral-run bootstrap --accept-new-host-key {host.name} {host.bootstrap_arguments}",
        )
    for pattern, what, command in _CONNECTION_PROBLEMS:
        if re.search(pattern, errors, re.IGNORECASE):
            return HostError(
                what.format(host=host),
                where=host.target,
                found=found,
                next_command=command.format(host=host, ssh=host.ssh_command()),
            )
    return HostError(
        f"{host.name} cannot be reached.", where=host.target, found=found, next_command=host.ssh_command("-v")
    )


def connection_problem(host: Host, errors: str) -> str:
    """Return what `connection_error` says, in one line for a table; with ssh's own words where the cause is unknown."""
    error = connection_error(host, errors)
    known = is_changed_key(errors) or any(re.search(problem[0], errors, re.I) for problem in _CONNECTION_PROBLEMS)
    return error.what if known else f"{error.what.removesuffix('.')}: {error.found}"


def _changed_jump_host(host: Host, errors: str) -> HostError:
    named = re.search(r"host key for (\S+) has changed", errors, re.I)
    recorded = re.search(_OFFENDING, errors, re.I | re.M)
    jump_host = named.group(1) if named else "JUMP_HOST"
    file = ["-f", recorded.group(1)] if recorded else []
    return HostError(
        f"The jump host {jump_host} before {host.name} has another host key than ssh knows: it was reimaged, or "
        "somebody intercepts the connection.",
        where=host.target,
        expected=f"the key in {recorded.group(1)}, line {recorded.group(2)}" if recorded else "the key that ssh knows",
        found=_fingerprint(errors),
        next_command=f"if it was reimaged: {shlex.join(['ssh-keygen', *file, '-R', jump_host])}, then "
        f"{host.ssh_command()}, which asks whether to accept the new key",
    )


# ssh passes on what the host prints, and that may be long. Bounded repetitions keep the search linear in its length.
_CHANGED_KEY = r"host key .{0,400}has changed|identification has changed"
_OFFENDING = r"^Offending .{0,80}key in (.{1,4096}):(\d{1,9})\s*$"

_CONNECTION_PROBLEMS = (
    (
        # The key of the host is accepted at first contact. ~/.ssh/config controls how ssh checks the jump host's key.
        r"host key verification failed",
        "The key of the jump host before {host.name} is not the one that ssh knows, or not known yet.",
        "{ssh}, which prints details and asks whether to accept the key",
    ),
    (
        r"permission denied|too many authentication failures",
        "{host.name} refuses the key.",
        "mixtral-run bootstrap --ask-pass {host.bootstrap_arguments}, which installs your key",
    ),
    (
        r"could not resolve|name or service not known|temporary failure in name resolution",
        "The name {host.address} cannot be resolved.",
        "check the spelling, or give {host.address} a HostName in ~/.ssh/config",
    ),
    (r"connection refused", "{host.name} refuses the connection: no sshd listens there.", "check its port and power"),
    (
        r"timed out|no route to host|network is unreachable|no answer",
        "{host.name} does not answer.",
        "ping {host.address}",
    ),
)


def is_dropped(errors: str) -> bool:
    """Return True if sshd closed the connection before a command ran, so that a retry may succeed."""
    # Behind a jump host, every problem of the jump host ends with such a line. Another line then gives the reason.
    lasting = is_changed_key(errors) or any(re.search(problem[0], errors, re.I) for problem in _CONNECTION_PROBLEMS)
    return not lasting and bool(re.search(_DROPPED, errors, re.I | re.M)) and "open failed" not in errors


# After a command has started, ssh prints `Connection to HOST closed` and `Read from remote host HOST` instead.
_DROPPED = r"(kex|ssh)_exchange_identification|^Connection (closed|reset) by \S+ port \d+"


def is_changed_key(errors: str) -> bool:
    """Return True if ssh refused a host because its key differs from the recorded one."""
    return bool(re.search(_CHANGED_KEY, errors, re.I))


def _fingerprint(errors: str) -> str:
    match = re.search(r"(?:SHA256:[A-Za-z0-9+/]+)", errors)
    return f"a key with fingerprint {match.group(0)}" if match else "another key"


def last_line(text: str) -> str:
    """Return the last line of a text that is not blank, or an empty string."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def reason_of(text: str) -> str:
    """Return the line in which the engine's client says why it failed: the last one that is not its advice."""
    return last_line(re.sub(r"^(Run|See) 'docker .*--help'.*$", "", text, flags=re.MULTILINE))


def odd_answer(host: Host, what: str, found: str) -> HostError:
    """Return the error for a host that answers in another form than the kit's script prints."""
    return HostError(
        f"{host.name} {what}: its answer is not in the expected form.",
        where=host.target,
        found=one_line(found),
        next_command=f"mixtral-run status {host.name}",
    )
