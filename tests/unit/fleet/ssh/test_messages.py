"""What ssh says of the key of a jump host, and which of its lines is the reason."""

from __future__ import annotations

from mixtral_run.fleet.hosts import Host, parse_host
from mixtral_run.fleet.ssh.problems import connection_error, connection_problem, last_line, reason_of

HOST = Host("gpu-01", "10.0.0.1", "ops", 2222)
JUMP = """host key for bastion has changed
Offending ED25519 key in /home/me/.ssh/known_hosts:12
{}
SHA256:9T8Wx/zX1r3W.
"""


def test_the_recorded_key_of_a_jump_host_is_named_by_file_and_line() -> None:
    for dropped in ("Connection closed by UNKNOWN port 65535", "KEX_exchange_identification: closed"):
        error = connection_error(HOST, JUMP.format(dropped))
        assert error.what.startswith("The jump host bastion before gpu-01 has another host key than ssh knows")
        assert error.expected == "the key in /home/me/.ssh/known_hosts, line 12"
        assert error.found == "a key with fingerprint SHA256:9T8Wx/zX1r3W"
        assert error.next_command == (
            "if it was reimaged: ssh-keygen -f /home/me/.ssh/known_hosts -R bastion, then ssh -p 2222 -l ops "
            "10.0.0.1, which asks whether to accept the new key"
        )
    lower = connection_error(HOST, JUMP.format("connection CLOSED by UNKNOWN port 1").replace("Offending", "offending"))
    assert lower.expected == "the key in /home/me/.ssh/known_hosts, line 12"
    assert lower.where == HOST.target
    changed = connection_error(HOST, "Host key for x has changed\nand again")
    assert (changed.found, changed.expected) == ("another key", "the key recorded at first contact")


def test_last_lines() -> None:
    assert [last_line(text) for text in ("", " \n", "a\n b \n\n")] == ["", "", "b"]
    assert reason_of("why\nRun 'docker run --help' for more\nSee 'docker --help'.\n") == "why"
    assert connection_error(parse_host("a"), "").found == "ssh ended without a message"


def test_a_row_of_a_table_gives_the_cause_or_the_words_of_ssh() -> None:
    """`status` prints this one line, and "cannot be reached" alone does not tell what to do."""
    for errors, expected in (
        ("Host key for x has changed\n", "The host key of gpu-01 has changed: the host was reimaged, or somebody"),
        ("connect to host 10.0.0.1 port 2222: Connection refused\n", "gpu-01 refuses the connection: no sshd"),
        ("kex_exchange_identification: banner\n", "gpu-01 cannot be reached: kex_exchange_identification: banner"),
        ("", "gpu-01 cannot be reached: ssh ended without a message"),
    ):
        assert connection_problem(HOST, errors).startswith(expected)
        assert "\n" not in connection_problem(HOST, errors)
