"""A fresh host's own updates hold apt's locks, which apt-get does not wait for by itself: the kit does."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, preflight_script, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
APT = sys.modules[PACKAGES.Apt.__module__]
LISTS = "/var/lib/apt/lists/lock"
ARCHIVES = "/var/cache/apt/archives/lock"


def _apt_get(programs: Programs, verb: str, lock: str, times: int) -> None:  # noqa: F811
    """An apt-get whose `verb` finds the lock held so many times; it prints what apt does."""
    counter = programs.folder / "tries"
    programs.put(
        "apt-get",
        f'case " $* " in *--simulate*) exit 0 ;; *" {verb} "*) ;; *) exit 0 ;; esac',
        f"echo x >> {counter}",
        f'[ "$(wc -l < {counter})" -le {times} ] || exit 0',
        f"echo 'E: Could not get lock {lock}. It is held by process 7 (apt-get)' >&2; exit 100",
    )


@pytest.fixture
def settings(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:  # noqa: F811
    programs.put("dpkg-query", "echo docker-ce 5:1 installed")
    for name in ("dpkg", "apt-mark", "apt-cache"):
        programs.put(name)
    monkeypatch.setattr(APT, "RETRY_SECONDS", 0.01)
    return {"record_folder": tmp_path / "records", "section": "tests", "names": ["tool"]}


@pytest.mark.parametrize(("verb", "lock"), [("update", LISTS), ("install", ARCHIVES)])
def test_packages_are_installed_once_the_lock_is_free(
    programs: Programs,  # noqa: F811
    settings: dict,
    verb: str,
    lock: str,
) -> None:
    _apt_get(programs, verb, lock, 3)
    assert call_module(PACKAGES, **settings)["changed"]
    assert len([call for call in programs.calls("apt-get") if f" {verb}" in call and "--simulate" not in call]) == 4


def test_a_lock_that_is_never_freed_is_reported(programs: Programs, settings: dict) -> None:  # noqa: F811
    _apt_get(programs, "update", LISTS, 10**6)
    result = call_module(PACKAGES, **settings, lock_timeout_seconds=0)
    assert result["failed"] and LISTS in result["msg"] and "another package manager runs: wait" in result["msg"]


# dpkg 1.21 (Debian 12), dpkg 1.19 (Ubuntu 20.04).
DPKG_LOCKED = (
    "dpkg: error: dpkg frontend lock was locked by another process with pid 316",
    "dpkg: error: dpkg frontend is locked by another process",
)


def _busy_dpkg(programs: Programs, words: str, times: int) -> None:  # noqa: F811
    """A dpkg database with a package that an apt of another process unpacks; it is done after `times` attempts."""
    counter = programs.folder / "tries"
    programs.put("apt-get")
    programs.put(
        "dpkg",
        f"tries=$(cat {counter} 2>/dev/null | wc -l)",
        f'case "$1" in --audit) [ "$tries" -ge {times} ] || echo "tool is only half configured"; exit 0 ;; esac',
        f"echo x >> {counter}; echo '{words}' >&2; exit 2",
    )


@pytest.mark.parametrize("words", DPKG_LOCKED)
def test_an_apt_that_a_killed_run_left_behind_is_waited_for(programs: Programs, settings: dict, words: str) -> None:  # noqa: F811
    _busy_dpkg(programs, words, 3)
    assert call_module(PACKAGES, **settings)["changed"]
    calls = [call.split()[1] for call in programs.calls("dpkg") if call.startswith("dpkg ")]
    assert calls == ["--audit", "--force-confold"] * 3 + ["--audit"]


def test_a_dpkg_that_stays_locked_is_reported(programs: Programs, settings: dict) -> None:  # noqa: F811
    _busy_dpkg(programs, DPKG_LOCKED[0], 10**6)
    result = call_module(PACKAGES, **settings, lock_timeout_seconds=0)
    assert result["failed"] and "pid 316" in result["msg"] and "another package manager runs: wait" in result["msg"]
    assert not [call for call in programs.calls("apt-get") if " install" in call and "--simulate" not in call]


def _preflight(programs: Programs) -> subprocess.CompletedProcess[str]:  # noqa: F811
    programs.put("python3", "exit 1")
    programs.put("sleep")
    return subprocess.run(["/bin/sh", "-c", preflight_script()], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("verb", "lock"), [("update", LISTS), ("install", ARCHIVES)])
def test_python_is_installed_once_the_lock_is_free(programs: Programs, verb: str, lock: str) -> None:  # noqa: F811
    _apt_get(programs, verb, lock, 2)
    done = _preflight(programs)
    assert done.returncode == 0 and done.stdout == "mixtral-run begins\ninstalled by mixtral-run: python3\n", (
        done.stderr
    )
    assert len(programs.calls("sleep")) == 2


def test_what_else_apt_says_ends_it_at_once(programs: Programs) -> None:  # noqa: F811
    programs.put("apt-get", "echo 'E: Unable to locate package python3' >&2; exit 100")
    done = _preflight(programs)
    assert done.returncode == 9 and "Unable to locate" in done.stdout and not programs.calls("sleep")


def test_preflight_installs_python_under_any_umask(programs: Programs) -> None:  # noqa: F811
    programs.put("python3", "exit 127")
    programs.put("apt-get", f"umask > {programs.folder}/umask")
    script = f"umask 077; {preflight_script()}"
    assert subprocess.run(["/bin/sh", "-c", script], check=False, capture_output=True).returncode == 0
    assert (programs.folder / "umask").read_text().strip() == "0022"
