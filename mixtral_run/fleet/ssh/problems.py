"""What ssh's complaints mean, and what to do about them."""

from __future__ import annotations

import re
import shlex

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host


def connection_error(host: Host, errors: str) -> HostError:
    """ssh's complaint, as what it means and what to do."""
    found = last_line(errors) or "ssh ended without a word"
    if is_changed_key(errors):
        # After its own complaint ssh ends without another word: one that goes on to lose the connection tells what
        # the ssh before it has said, that to the jump host.
        if re.search(_DROPPED, errors, re.I | re.M):
            return _changed_jump_host(host, errors)
        return HostError(
            f"{host.name} shows another host key than before: it was reimaged, or somebody sits in between.",
            where=host.target,
            expected="the key recorded at first contact",
            found=_fingerprint(errors),
            next_command="if it was reimaged: "
            f"mixtral-run bootstrap --accept-new-host-key {host.name} {host.bootstrap_words}",
        )
    for pattern, what, command in _CONNECTION_PROBLEMS:
        if re.search(pattern, errors, re.IGNORECASE):
            return HostError(
                what.format(host=host), where=host.target, found=found, next_command=command.format(host=host)
            )
    return HostError(
        f"{host.name} cannot be reached.", where=host.target, found=found, next_command=f"ssh -v {host.address}"
    )


def _changed_jump_host(host: Host, errors: str) -> HostError:
    named = re.search(r"host key for (\S+) has changed", errors, re.I)
    recorded = re.search(r"^Offending .*key in (.+):(\d+)\s*$", errors, re.I | re.M)
    jump_host = named.group(1) if named else "JUMP_HOST"
    file = ["-f", recorded.group(1)] if recorded else []
    return HostError(
        f"The jump host {jump_host} before {host.name} has another host key than ssh knows: it was reimaged, or "
        "somebody sits in between.",
        where=host.target,
        expected=f"the key in {recorded.group(1)}, line {recorded.group(2)}" if recorded else "the key that ssh knows",
        found=_fingerprint(errors),
        next_command=f"if it was reimaged: {shlex.join(['ssh-keygen', *file, '-R', jump_host])}, then "
        f"ssh {host.address}, which asks for the new one",
    )


_CONNECTION_PROBLEMS = (
    (
        # The host's own key is accepted at first contact; ~/.ssh/config says how ssh looks at that of a jump host.
        r"host key verification failed",
        "The key of the jump host before {host.name} is not the one that ssh knows, or not known yet.",
        "ssh {host.address}, which tells more and asks",
    ),
    (
        r"permission denied|too many authentication failures",
        "{host.name} refuses the key.",
        "mixtral-run bootstrap --ask-pass {host.bootstrap_words}, which puts your key there",
    ),
    (
        r"could not resolve|name or service not known|temporary failure in name resolution",
        "The name {host.address} is not known.",
        "look at the spelling, or give {host.address} a HostName in ~/.ssh/config",
    ),
    (r"connection refused", "{host.name} refuses the connection: no sshd listens there.", "look at its port and power"),
    (
        r"timed out|no route to host|network is unreachable|no answer",
        "{host.name} does not answer.",
        "ping {host.address}",
    ),
)


def is_dropped(errors: str) -> bool:
    """Whether sshd closed a connection before anything ran over it, and another try may get through."""
    # Behind a jump host, whatever keeps that from going on looks so at the end: then another line says why.
    lasting = is_changed_key(errors) or any(re.search(problem[0], errors, re.I) for problem in _CONNECTION_PROBLEMS)
    return not lasting and bool(re.search(_DROPPED, errors, re.I | re.M)) and "open failed" not in errors


# Once a command runs, ssh says `Connection to HOST closed` and `Read from remote host HOST`: no such line is meant.
_DROPPED = r"(kex|ssh)_exchange_identification|^Connection (closed|reset) by \S+ port \d+"


def is_changed_key(errors: str) -> bool:
    return bool(re.search(r"host key .*has changed|identification has changed", errors, re.I))


def _fingerprint(errors: str) -> str:
    match = re.search(r"(?:SHA256:[A-Za-z0-9+/]+)", errors)
    return f"a key with fingerprint {match.group(0)}" if match else "another key"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
