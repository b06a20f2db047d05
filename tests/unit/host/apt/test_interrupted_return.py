"""Replaced packages are restored completely even if earlier runs were interrupted."""

from __future__ import annotations

import pytest

from tests.unit.host.apt.test_replaced import Host, host  # noqa: F401 - a fixture
from tests.unit.host.conftest import load_module
from tests.unit.host.programs import programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
WANTED = {"bash": "5", "docker.io": "20", "runc": "1"}


def marks(host: Host) -> list[str]:  # noqa: F811
    return [call for call in host.programs.calls("apt-mark") if call.split()[1] in ("auto", "hold")]


def test_services_are_recorded_as_they_were_before_a_replacement_that_was_cut_off(host: Host) -> None:  # noqa: F811
    host.programs.put("systemctl", 'case "$1" in is-enabled) echo enabled ;; is-active) echo active ;; esac')
    apt = (host.programs.folder / "apt-get").read_text()
    removal = f"sed -i 's/^docker.io \\(.*\\) installed/docker.io \\1 config-files/' {host.state}; exit 100"
    host.programs.put("apt-get", f'case "$*" in *simulate*|*update*) ;; *install*) {removal} ;; esac', apt)
    assert host.call()["failed"] and "docker.io" not in host.packages() and "runc" in host.packages()
    host.programs.put("systemctl", 'case "$1" in is-enabled) echo disabled ;; is-active) echo inactive ;; esac')
    host.programs.put("apt-get", apt)
    assert not host.call().get("failed")
    found = host.record()["docker_replaced"]
    assert found["units"] == {"docker.service": ["enabled", "active"]} and set(found["packages"]) == {
        "docker.io",
        "runc",
    }
    # A later replacement records what is there then.
    host.state.write_text("bash 5 installed install\ndocker.io 20 installed hold\nrunc 1 installed install\n")
    host.call()
    assert host.record()["docker_replaced"]["units"] == {"docker.service": ["disabled", "inactive"]}


@pytest.mark.parametrize("installed", ["runc", "runc docker.io"])
def test_marks_and_services_come_back_after_a_return_that_was_cut_off(host: Host, installed: str) -> None:  # noqa: F811
    """apt installed some of the packages, or all, and the run ended before it came to the marks."""
    host.programs.put("systemctl", 'case "$1" in is-enabled) echo enabled ;; is-active) echo active ;; esac')
    host.call()
    apt = (host.programs.folder / "apt-get").read_text()
    done = "".join(
        f"sed -i '/^{name} /d' {host.state}; echo {name} {WANTED[name]} installed install >> {host.state}; "
        for name in installed.split()
    )
    host.programs.put(
        "apt-get", f'case "$*" in *simulate*|*download*|*update*) ;; *install*) {done} exit 100 ;; esac', apt
    )
    assert host.call(state="absent")["failed"] and not marks(host)
    host.programs.put("apt-get", apt)
    host.programs.put("systemctl", 'case "$1" in is-enabled) echo disabled ;; is-active) echo inactive ;; esac')
    result = host.call(state="absent")
    assert not result.get("failed") and host.packages() == WANTED, result
    assert marks(host) == ["apt-mark auto runc", "apt-mark hold docker.io"]
    calls = host.programs.calls("systemctl")
    assert "systemctl enable docker.service" in calls and "systemctl start docker.service" in calls
    assert not (host.folder / "records/packages.json").exists()
    assert not host.call(state="absent")["changed"]


def test_a_teardown_completes_what_dpkg_had_begun(host: Host) -> None:  # noqa: F811
    host.call()
    journal = host.folder / "updates"
    dpkg, apt = ((host.programs.folder / name).read_text() for name in ("dpkg", "apt-get"))
    host.programs.put(
        "dpkg", f'case "$*" in --audit) cat {journal} 2>/dev/null ;; *configure*) rm -f {journal} ;; esac', dpkg
    )
    refusal = 'echo "E: dpkg was interrupted, you must manually run dpkg --configure -a"; exit 100'
    host.programs.put(
        "apt-get",
        f'if test -e {journal}; then case "$*" in *simulate*|*update*) ;; *) echo "{refusal}"; exit 100 ;; esac; fi',
        apt,
    )
    journal.write_text("runc is half configured\n")
    assert not host.call(state="absent", check_mode=True).get("failed") and journal.exists()
    result = host.call(state="absent")
    assert not result.get("failed") and host.packages() == WANTED, result
    assert not host.call(state="absent")["changed"]


def test_a_package_that_somebody_holds_is_not_changed_by_a_return(host: Host) -> None:  # noqa: F811
    host.call()
    apt = (host.programs.folder / "apt-get").read_text()
    change = 'case "$*" in *simulate*docker.io*) echo "Inst bash [5] (6 x [amd64])" ;; esac'
    host.programs.put("apt-get", change, apt)
    assert not host.call(state="absent", check_mode=True, remove_dependents=False).get("failed"), "nobody holds it"
    host.state.write_text(host.state.read_text().replace("bash 5 installed install", "bash 5 installed hold"))
    before, record = host.packages(), host.record()
    result = host.call(state="absent", remove_dependents=False)
    assert result["failed"] and "bash 5 (held by somebody)" in result["msg"]
    assert host.packages() == before and host.record() == record
    assert not host.call(state="absent").get("failed") and host.packages() == WANTED
