"""Time services and firewalls, from what systemctl, ufw and firewall-cmd print."""

from __future__ import annotations

import pytest
from ansible.module_utils.mixtral_run_host import commands, services

from tests.unit.host.checks.test_shortfalls import _collect
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

UFW = """\
Status: active

To                         Action      From
--                         ------      ----
22/tcp                     ALLOW       Anywhere
{row}
22/tcp (v6)                ALLOW       Anywhere (v6)
"""


@pytest.mark.parametrize(
    ("active", "expected"),
    [
        ((), []),
        (("chrony", "chronyd"), ["chrony"]),
        (("systemd-timesyncd",), ["systemd-timesyncd"]),
        (("ntpsec", "ntp"), ["ntpsec"]),
        (("chrony", "systemd-timesyncd"), ["chrony", "systemd-timesyncd"]),
    ],
)
def test_running_time_services(programs: Programs, active: tuple[str, ...], expected: list[str]) -> None:  # noqa: F811
    lines = [f"echo {'active' if name in active else 'inactive'}" for name in services.TIME_SERVICES]
    programs.put("systemctl", *lines, "exit 3")
    assert services.time_services() == expected
    programs.put("systemctl", "echo System has not been booted with systemd >&2", "exit 1")
    assert services.time_services() == []


@pytest.mark.parametrize(
    ("row", "admits"),
    [
        ("29400/tcp                  ALLOW       10.0.0.0/24", []),
        ("Anywhere                   ALLOW       10.0.0.0/24", ["10.0.0.0/24"]),
        ("Anywhere on eth1           ALLOW IN    10.0.0.12", ["10.0.0.12"]),
        ("Anywhere                   DENY        10.0.0.12", []),
        ("Anywhere                   ALLOW       Anywhere", []),
    ],
)
def test_whom_ufw_admits(programs: Programs, row: str, admits: list[str]) -> None:  # noqa: F811
    programs.put("ufw", f"cat <<'END'\n{UFW.format(row=row)}END")
    assert services.firewall() == {"name": "ufw", "admits": admits}


def test_other_firewalls(programs: Programs) -> None:  # noqa: F811
    programs.put("firewall-cmd", "exit 252")
    assert services.firewall() is None
    programs.put("ufw", "echo Status: inactive")
    programs.put("firewall-cmd", 'case "$1" in --state) echo running ;; *) echo 10.0.0.0/24 ;; esac')
    assert services.firewall() == {"name": "firewalld", "admits": ["10.0.0.0/24"]}


@pytest.mark.parametrize(
    ("running", "synchronized", "words"),
    [
        (["chrony"], True, None),
        ([], True, None),
        (["chrony"], None, None),
        (["chrony", "ntpsec"], True, "chrony and ntpsec"),
        (["chrony"], False, "not yet synchronized"),
        ([], False, "none"),
        ([], None, "none"),
    ],
)
def test_a_clock_that_nobody_keeps_is_a_warning(
    running: list[str], synchronized: bool | None, words: str | None
) -> None:
    found = _collect(time_services=running, clock_synchronized=synchronized)
    assert [(each.check, each.level, each.found) for each in found] == ([("time_sync", "warn", words)] if words else [])


@pytest.mark.parametrize(
    ("firewall", "num_hosts", "warns"),
    [
        (None, 8, False),
        ({"name": "ufw", "admits": []}, 1, False),
        ({"name": "ufw", "admits": []}, 2, True),
        ({"name": "ufw", "admits": ["10.0.0.0/24"]}, 2, False),
        ({"name": "firewalld", "admits": []}, 2, True),
    ],
)
def test_a_firewall_that_keeps_the_other_hosts_out_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, firewall: dict | None, num_hosts: int, warns: bool
) -> None:
    from tests.unit.host.checks import test_shortfalls

    monkeypatch.setitem(test_shortfalls.LIMITS, "num_hosts", num_hosts)
    found = _collect(firewall=firewall)
    assert [(each.check, each.level) for each in found] == ([("firewall", "warn")] if warns else [])


def test_programs_are_asked_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float]] = []

    def run(argv: list[str], timeout: float) -> commands.Result:
        asked.append((" ".join(argv[:2]), timeout))
        return commands.Result(0, "running" if argv[1] == "--state" else "", "")

    monkeypatch.setattr(services, "run", run)
    services.time_services()
    services.firewall()
    names = ["systemctl is-active", "ufw status", "firewall-cmd --state", "firewall-cmd --zone=trusted"]
    assert asked == [(name, 15) for name in names]
