"""Packages that were there before the kit's get the holds back that they had; what the kit installed it removes."""

import json
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
THEIRS = {"free", "kept"}
"""Packages of somebody; `kept` is held."""


class Host:
    """A host whose stand-in apt installs, removes and holds: a folder of installed packages, and one of those held."""

    def __init__(self, programs: Programs, folder: Path) -> None:  # noqa: F811
        self.folder = folder
        installed, held = folder / "installed", folder / "held"
        for made, names in ((installed, THEIRS), (held, {"kept"})):
            made.mkdir()
            for name in names:
                (made / name).touch()
        programs.put("dpkg")
        programs.put(
            "dpkg-query",
            f"for name in $(ls {installed}); do",
            f'if [ -e {held}/$name ]; then want=hold; else want=install; fi; echo "$name 1 installed $want"; done',
        )
        programs.put(
            "apt-mark",
            'verb=$1; shift; case "$verb" in',
            f'hold) cd {held} && touch "$@" ;;',
            f'unhold) cd {held} && rm -f "$@" ;;',
            "esac",
        )
        programs.put(
            "apt-get",
            'for word in "$@"; do name=${word%%=*}; case "$verb $name" in',
            f'"install "[a-z]*) touch {installed}/$name; rm -f {held}/$name ;;',
            f'"remove "[a-z]*) rm {installed}/$name ;;',
            "esac; case $word in install|remove) verb=$word ;; esac; done",
        )

    def names(self, folder: str) -> set[str]:
        return {path.name for path in (self.folder / folder).iterdir()}

    def call(self, **more: object) -> dict:
        return call_module(PACKAGES, self.folder / "records", section="docker", names=["kit", "free", "kept"], **more)


@pytest.fixture
def host(programs: Programs, tmp_path: Path) -> Host:  # noqa: F811
    return Host(programs, tmp_path)


@pytest.mark.parametrize(("hold", "held"), [(True, {"kit", "free", "kept"}), (False, set())])
@pytest.mark.parametrize("versions", [{}, {"kept": "1*"}, {"kept": "2*"}], ids=["any", "as it is", "another"])
def test_holds_are_as_they_were_once_the_kit_leaves(host: Host, hold: bool, held: set, versions: dict) -> None:
    for _ in range(2):
        host.call(hold=hold, versions=versions)
        assert host.names("installed") == {"kit", *THEIRS} and host.names("held") == held
    assert host.call(state="absent")["removed"] == ["kit"]
    assert host.names("installed") == THEIRS and host.names("held") == {"kept"}
    assert not host.call(state="absent")["changed"] and not list((host.folder / "records").glob("*"))


def test_what_was_changed_first_counts(host: Host) -> None:
    for hold in (False, True, False, True):
        host.call(hold=hold)
    assert host.names("held") == {"kit", *THEIRS}
    host.call(state="absent")
    assert host.names("held") == {"kept"}


def test_a_package_that_somebody_removed_is_not_held(host: Host) -> None:
    host.call()
    (host.folder / "installed/free").unlink()
    (host.folder / "held/free").unlink()
    host.call(state="absent")
    assert host.names("held") == {"kept"}


def test_a_record_of_an_earlier_kit_tells_of_no_holds(host: Host) -> None:
    host.call()
    record = host.folder / "records/packages.json"
    record.write_text(json.dumps({"docker": json.loads(record.read_text())["docker"]}))
    assert host.call(state="absent")["removed"] == ["kit"]
    assert host.names("held") == THEIRS


def test_dependencies_are_held_with_the_packages_and_let_go_with_them(host: Host) -> None:
    settings = {"section": "docker", "names": ["kit"], "hold_also": "fre|kept"}
    assert call_module(PACKAGES, host.folder / "records", **settings)["changed"]
    assert host.names("held") == {"kit", "free", "kept"}
    assert not call_module(PACKAGES, host.folder / "records", **settings)["changed"]
    host.call(state="absent")
    assert host.names("held") == {"kept"} and host.names("installed") == THEIRS


def test_packages_of_the_kernel_keep_their_holds(host: Host) -> None:
    settings = {"section": "docker", "names": ["kit", "free", "kept"], "leave_holds": ["free", "kept"]}
    call_module(PACKAGES, host.folder / "records", **settings)
    assert host.names("held") == {"kit", "kept"}
    assert not call_module(PACKAGES, host.folder / "records", **settings)["changed"]
