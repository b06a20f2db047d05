from __future__ import annotations

import time
from pathlib import Path

import pytest

from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.ssh.connection import Answer, Ssh, connection_options, destination, ssh_argv
from mixtral_run.fleet.ssh.problems import connection_error, is_changed_key, is_dropped

KNOWN = Path("/state/known hosts")
HOST = parse_host("gpu-01")


def test_the_words_of_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert connection_options(KNOWN) == [
        "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new",
        "-o", 'UserKnownHostsFile="/state/known hosts" "/home/me/.ssh/known_hosts"',
        "-o", "HashKnownHosts=no", "-o", "UpdateHostKeys=no", "-o", "ConnectTimeout=10",
        "-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-o", "LogLevel=ERROR",
    ]  # fmt: skip


def test_a_destination_comes_after_the_options_and_never_is_one() -> None:
    host = Host("gpu-01", "10.0.0.1", "ops", 2222, "/keys/a b", ("-J", "bastion"))
    assert destination(host) == ["-J", "bastion", "-p", "2222", "-l", "ops", "-i", "/keys/a b", "--", "10.0.0.1"]
    assert destination(parse_host("gpu-01")) == ["--", "gpu-01"]


def test_every_word_of_a_command_is_quoted() -> None:
    argv = ssh_argv(parse_host("gpu-01"), ["touch", "a b", "$(reboot)", "it's", ";id", "--x=`y`"], KNOWN)
    assert argv[-1] == "touch 'a b' '$(reboot)' 'it'\"'\"'s' ';id' '--x=`y`'"
    assert argv[-3:-1] == ["--", "gpu-01"]


CHANGED = """@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
The fingerprint for the ED25519 key sent by the remote host is
SHA256:9T8Wx/zX1r3W.
Host key for [127.0.0.1]:2222 has changed and you have requested strict checking.
Host key verification failed."""


# The ssh process that continues to the host learns of the jump host only that the connection ended.
CHANGED_BEFORE = f"""{CHANGED}
kex_exchange_identification: Connection closed by remote host
Connection closed by UNKNOWN port 65535"""


@pytest.mark.parametrize(
    ("errors", "again"),
    [
        (
            "kex_exchange_identification: read: Connection reset by peer\r\nConnection reset by 10.0.0.1 port 22\r\n",
            True,
        ),
        (
            "kex_exchange_identification: Connection closed by remote host\r\n"
            "Connection closed by UNKNOWN port 65535\r\n",
            True,
        ),
        ("ssh_exchange_identification: Connection closed by remote host", True),
        ("Connection reset by 10.0.0.1 port 22", True),
        # A jump host that refuses, or that cannot reach the host, will do so again.
        ("ops@bastion: Permission denied (publickey).\r\nConnection closed by UNKNOWN port 65535\r\n", False),
        (
            "channel 0: open failed: administratively prohibited: open failed\nstdio forwarding failed\n"
            "kex_exchange_identification: Connection closed by remote host",
            False,
        ),
        ("channel 0: open failed: connect failed: Connection refused\nConnection closed by UNKNOWN port 65535", False),
        # The command may have run already.
        ("Connection to gpu-01 closed by remote host.", False),
        ("Read from remote host gpu-01: Connection reset by peer", False),
        (CHANGED, False),
        (CHANGED_BEFORE, False),
    ],
)
def test_only_what_was_dropped_at_its_start_is_tried_again(errors: str, again: bool) -> None:
    assert is_dropped(errors) is again


def test_a_host_of_an_inventory_is_set_up_again_with_it() -> None:
    host = Host("gpu-01", "10.0.0.1", "ops", inventory="/racks/hosts.yml")
    for errors, flag in ((CHANGED, "--accept-new-host-key gpu-01"), ("Permission denied (publickey).", "--ask-pass")):
        reported = connection_error(host, errors).next_command or ""
        assert f"mixtral-run bootstrap {flag} -i /racks/hosts.yml --limit gpu-01" in reported


@pytest.mark.parametrize(
    ("errors", "what", "command"),
    [
        (CHANGED, "The host key of gpu-01:2222 has changed", "--accept-new-host-key gpu-01:2222 ops@gpu-01:2222"),
        (
            CHANGED_BEFORE,
            "The jump host [127.0.0.1]:2222 before gpu-01:2222 has another host key",
            "ssh-keygen -R '[127.0.0.1]:2222', then ssh -p 2222 -l ops gpu-01",
        ),
        ("ops@gpu-01: Permission denied (publickey).", "refuses the key", "bootstrap --ask-pass ops@gpu-01:2222"),
        ("ssh: Could not resolve hostname gpu-01: Name or service not known", "cannot be resolved", "HostName"),
        ("ssh: connect to host gpu-01 port 2222: Connection refused", "refuses the connection", "port"),
        ("ssh: connect to host gpu-01 port 2222: Connection timed out", "does not answer", "ping gpu-01"),
        ("kex_exchange_identification: read: Connection reset", "cannot be reached", "ssh -v"),
    ],
)
def test_what_ssh_says_becomes_what_to_do(errors: str, what: str, command: str) -> None:
    error = connection_error(parse_host("ops@gpu-01:2222"), errors)
    assert what in error.what
    assert command in (error.next_command or "")
    assert error.exit_code == 3


def program_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Ssh:
    """STAND-IN for ssh: a program in its place."""
    (tmp_path / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return Ssh(tmp_path / "known_hosts")


def test_both_outputs_and_the_exit_code_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = program_ssh(tmp_path, monkeypatch, "cat; echo why >&2; exit 3")
    data = b"x" * 3_000_000
    assert ssh.run(HOST, ["true"], stdin=data) == Answer(3, data.decode(), "why\n")
    assert ssh.run(HOST, ["true"]) == Answer(3, "", "why\n")


def test_a_program_that_does_not_read_its_input_is_none_the_worse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ssh = program_ssh(tmp_path, monkeypatch, "echo done")
    assert ssh.run(HOST, ["true"], stdin=b"x" * 3_000_000) == Answer(0, "done\n", "")


def test_a_program_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = program_ssh(tmp_path, monkeypatch, "exec sleep 60")
    assert ssh.run(HOST, ["true"], timeout_seconds=0.3) == Answer(124, "", "no answer within 0.3 s")


@pytest.mark.parametrize("where", ["", ">&2"])
def test_an_answer_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    ssh = program_ssh(tmp_path, monkeypatch, f"exec cat /dev/zero {where}")
    assert ssh.run(HOST, ["true"]) == Answer(1, "", "the answer is longer than 16 MiB")


def test_a_line_without_end_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ssh = program_ssh(tmp_path, monkeypatch, "head -c 5000000 /dev/zero | tr '\\0' x; echo; echo end")
    found: list[str] = []
    assert ssh.stream(HOST, ["true"], found.append) == 0
    assert "".join(found) == "x" * 5_000_000 + "end" and found[-1] == "end"
    assert max(map(len, found)) <= 2 * 2**20


def test_a_long_hostile_error_takes_no_time() -> None:
    began = time.process_time()
    assert not is_changed_key("host key " * 100_000)
    changed = "host identification has changed\nssh_exchange_identification\n"
    connection_error(HOST, changed + "Offending " + "key in " * 10_000 + ":1" * 10_000 + "x")
    assert time.process_time() - began < 5


def test_the_command_in_a_hint_selects_the_host_as_the_kit_does() -> None:
    options = ("-o", "ProxyJump=ops@gate:22")
    host = Host("gpu-01", "10.0.0.5", "ubuntu", 2222, "/keys/a key", options, "/srv/hosts.yml")
    expected = "ssh -v -o ProxyJump=ops@gate:22 -p 2222 -l ubuntu -i '/keys/a key' 10.0.0.5"
    assert connection_error(host, "an unknown problem").next_command == expected
    jump = connection_error(host, "Host key verification failed.").next_command
    assert jump is not None and jump.startswith(expected.replace(" -v", ""))
