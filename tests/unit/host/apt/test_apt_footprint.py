"""A removal takes what came with the packages: dependencies, settings, folders and groups; the rest stays."""

import json
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
INSTALL = """Inst bash [5.1] (5.2 Debian:12 [amd64])
Inst libneeded:amd64 (1 Debian:12 [amd64])
Inst libdep (1 Debian:12 [amd64])
Inst engine (1 Docker:1 [amd64])"""


class Host:
    """A host whose packages are lines `NAME STATUS` of a file that the stand-in programs read and change."""

    def __init__(self, programs: Programs, folder: Path) -> None:  # noqa: F811
        self.state, self.programs, self.folder = folder / "dpkg", programs, folder
        self.etc = folder / "etc"
        self.etc.mkdir()
        self.put(bash="installed")
        programs.put(
            "dpkg-query",
            f'case "$*" in *Version*) sed "s/ / 1 /; s/$/ install/" {self.state} ;; *) cat {self.state} ;; esac',
        )
        programs.put("dpkg", f'case "$1" in --purge) shift; for n; do sed -i "/^$n /d" {self.state}; done ;; esac')
        programs.put("apt-mark")
        programs.put(
            "apt-get",
            'case "$*" in',
            # Like apt, it plans nothing for packages that are held.
            "*--simulate*remove*--allow-change-held-packages*|*--simulate*install*) ;;",
            "*--simulate*remove*) exit 100 ;; esac",
            'case "$*" in',
            f'*--simulate*install*) cat <<"END"\n{INSTALL}\nEND',
            ";; *--simulate*autoremove*) echo 'Remv engine [1]'; echo 'Remv libdep [1]'; echo 'Remv old-kernel [1]'",
            ";; *--simulate*remove*) echo 'Remv engine [1]'",
            f";; *install*) printf 'libneeded installed\\nlibdep installed\\nengine installed\\n' >> {self.state}",
            f"touch {self.etc}/key; mkdir {self.etc}/mine {self.etc}/full; touch {self.etc}/full/x",
            ";; *remove*) for word; do",
            f'sed -i "s/^$word installed/$word config-files/" {self.state}; done ;; esac',
        )

    def put(self, **packages: str) -> None:
        text = "".join(f"{name.replace('_', '-')} {status}\n" for name, status in packages.items())
        self.state.write_text((self.state.read_text() if self.state.exists() else "") + text)

    def packages(self) -> dict[str, str]:
        return dict(line.split() for line in self.state.read_text().splitlines())

    def call(self, **more: object) -> dict:
        leftovers = [str(self.etc / name) for name in ("key", "mine", "full", "theirs", "none")]
        given = {"section": "docker", "names": ["engine"], "leftovers": leftovers, "hold": False, **more}
        return call_module(PACKAGES, self.folder / "records", **given)


@pytest.fixture
def host(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:  # noqa: F811
    return Host(programs, tmp_path)


def test_a_removal_leaves_the_host_as_it_was(host: Host) -> None:
    (host.etc / "theirs").touch()
    host.put(old_kernel="installed")
    before = host.packages()
    host.call()
    result = host.call(state="absent")
    # Its users need libneeded, and old-kernel did not come with the engine.
    assert host.packages() == {**before, "libneeded": "installed"}
    assert result["removed"] == ["engine", "libdep"]
    assert sorted(path.name for path in host.etc.iterdir()) == ["full", "theirs"]
    assert not (host.folder / "records/packages.json").exists()


def test_a_folder_that_only_settings_filled_goes_with_them(host: Host) -> None:
    host.call()
    host.programs.put("dpkg", f"[ $1 = --purge ] && rm {host.etc}/full/x")
    host.call(state="absent")
    assert list(host.etc.iterdir()) == []


def test_settings_that_were_there_before_stay(host: Host) -> None:
    host.put(engine="config-files")
    host.call()
    host.state.write_text("bash installed\nengine installed\nlibdep installed\n")
    host.call(state="absent")
    assert host.packages() == {"bash": "installed", "engine": "config-files"}


def test_a_removal_that_was_killed_is_completed(host: Host) -> None:
    host.call()
    host.state.write_text("bash installed\nengine config-files\nlibdep config-files\nlibneeded installed\n")
    assert host.call(state="absent")["changed"]
    assert host.packages() == {"bash": "installed", "libneeded": "installed"}
    assert sorted(path.name for path in host.etc.iterdir()) == ["full"]


def test_a_check_changes_nothing_and_lists_the_same(host: Host) -> None:
    host.call()
    before, record = host.packages(), json.loads((host.folder / "records/packages.json").read_text())
    assert host.call(state="absent", check_mode=True)["removed"] == ["engine", "libdep"]
    assert host.packages() == before
    assert json.loads((host.folder / "records/packages.json").read_text()) == record
