"""Time services, firewalls, memory and disks of a host, from answers of its programs that are written out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host import probe, services
from ansible.module_utils.mixtral_run_host.commands import Result

NAMES = ("chrony", "chronyd", "systemd-timesyncd", "ntpsec", "ntp", "ntpd", "openntpd")


@pytest.mark.parametrize(
    ("active", "found"),
    [
        ((), []),
        (("chrony", "chronyd"), ["chrony"]),
        (("chronyd",), ["chrony"]),
        (("ntpd",), ["ntp"]),
        (("ntpsec", "ntp"), ["ntpsec"]),
        (("ntp", "ntpd", "openntpd"), ["ntp", "openntpd"]),
        (("systemd-timesyncd", "chrony"), ["chrony", "systemd-timesyncd"]),
    ],
)
def test_time_services(monkeypatch: pytest.MonkeyPatch, active: tuple[str, ...], found: list[str]) -> None:
    out = "\n".join("active" if name in active else "inactive" for name in NAMES)
    monkeypatch.setattr(services, "run", lambda words, **_: Result(3, out, "") if len(words) == 9 else None)
    assert services.time_services() == found
    monkeypatch.setattr(services, "run", lambda *_, **__: Result(1, "active\n", "no systemd"))
    assert services.time_services() == []


UFW = """Status: active

To                         Action      From
Anywhere                   ALLOW       10.0.0.0/8
Anywhere on eth1           ALLOW IN    192.168.0.5
22/tcp                     ALLOW       172.16.0.1
Anywhere                   DENY        10.9.9.9
Anywhere                   ALLOW       Anywhere
"""


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ({"ufw": (0, UFW)}, {"name": "ufw", "admits": ["10.0.0.0/8", "192.168.0.5"]}),
        ({"ufw": (0, "Status: inactive")}, None),
        ({"ufw": (1, UFW)}, None),
        ({"--state": (0, "running"), "--zone=trusted": (0, "b a")}, {"name": "firewalld", "admits": ["a", "b"]}),
        ({"--state": (0, "not")}, None),
        ({"--state": (1, "running")}, None),
        ({}, None),
    ],
)
def test_firewalls(monkeypatch: pytest.MonkeyPatch, answers: dict[str, Any], found: Any) -> None:
    def run(words: list[str], timeout: int) -> Result:
        code, out = answers.get(words[0], answers.get(words[1], (127, "")))
        return Result(code, out, "")

    monkeypatch.setattr(services, "run", run)
    assert services.firewall() == found


@pytest.mark.parametrize(
    ("running", "offset", "kept", "expected"),
    [
        ([], None, False, None),
        (["chrony", "ntp"], 0.1, True, "one time service"),
        ([], 0.1, False, "a time service that keeps the clock"),
        ([], 0.1, True, None),
        (["chrony"], 0.1, False, "a clock that chrony has synchronized"),
        (["ntp"], 0.1, False, "a clock that ntp has synchronized"),
        (["chrony"], 0.1, True, None),
        (["chrony"], 0.1, None, None),
        (["chrony", "ntp"], None, None, None),
    ],
)
def test_what_is_said_of_clocks(running: list[str], offset: Any, kept: Any, expected: str | None) -> None:
    state = {"time_services": running, "clock_offset_seconds": offset, "clock_synchronized": kept}
    found = list(services.time_shortfall(state, None))
    assert [each[1] for each in found] == ([expected] if expected else [])
    if expected and expected.startswith("a clock that"):
        assert ("chronyc" in found[0][3]) is (running == ["chrony"])


@pytest.mark.parametrize(
    ("hosts", "firewall", "warned"),
    [
        (1, {"name": "ufw", "admits": []}, False),
        (2, None, False),
        (2, {"name": "ufw", "admits": ["a"]}, False),
        (2, {"name": "ufw", "admits": []}, True),
        (3, {"name": "firewalld", "admits": []}, True),
    ],
)
def test_what_is_said_of_firewalls(hosts: int, firewall: Any, warned: bool) -> None:
    found = list(services.firewall_shortfall({"firewall": firewall}, {"num_hosts": hosts}))
    assert len(found) == warned and all(firewall["name"].split("d")[0] in each[3] for each in found)


def test_memory_and_system(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {
        "/proc/meminfo": "MemTotal:       1572864 kB\nSwapTotal:      524288 kB\nOther: 5\n",
        "/r": 'NAME="Ubuntu"\nID=ubuntu\nVERSION_ID="22.04"\nVERSION_CODENAME=jammy\nPRETTY_NAME="Ubuntu 22.04 LTS"\n',
    }
    monkeypatch.setattr(probe, "read_text", lambda path, default: texts.get(path, default))
    assert probe.memory() == {"ram_gib": 1.5, "swap_gib": 0.5}
    assert probe.os_release("/r") == {
        "id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04 LTS",
    }  # fmt: skip
    assert set(probe.os_release("/none").values()) == {""}
    texts.clear()
    assert probe.memory() == {"ram_gib": 0.0, "swap_gib": 0.0}
    for machine, name in (("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")):
        monkeypatch.setattr(probe.os, "uname", lambda machine=machine: SimpleNamespace(machine=machine))
        assert probe.architecture() == name


def test_space_of_a_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    figures = SimpleNamespace(f_bavail=3 * 2**18, f_frsize=2**12, f_blocks=5 * 2**18)
    asked: list[str] = []
    monkeypatch.setattr(probe.os, "statvfs", lambda path: asked.append(path) or figures)
    monkeypatch.setattr(probe, "filesystem", lambda _: "ext4")
    missing = str(tmp_path / "not/yet")
    assert probe.disk(missing) == {"path": missing, "free_gib": 3.0, "total_gib": 5.0, "filesystem": "ext4"}
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize(("out", "gib"), [("5\t/a\n1610612736\ttotal\n", 1.5), ("", 0), ("x\ttotal\n", 0)])
def test_what_folders_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, out: str, gib: float) -> None:
    called: list[Any] = []
    monkeypatch.setattr(probe, "run", lambda words, timeout: called.append((words, timeout)) or Result(0, out, ""))
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    names = [str(tmp_path / each) for each in ("a", "link", "none")]
    assert probe.held_gib(str(tmp_path / "x/y"), [*names, "/proc"]) == gib
    ((words, timeout),) = called
    assert words[words.index("--") + 1 :] == [names[0]] and timeout == 120 and "--block-size=1" in words
    assert probe.held_gib(str(tmp_path), ["/proc", names[2]]) == 0 and len(called) == 1
