"""The folder of the sockets by which connections of Ansible to a host share one."""

import os
import socket
from pathlib import Path

import pytest

from mixtral_run.fleet.plays import control_sockets
from mixtral_run.fleet.plays.control_sockets import VARIABLE, settings


@pytest.fixture(autouse=True)
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.delenv("ANSIBLE_HOME", raising=False)
    monkeypatch.setattr(control_sockets, "SHORT_FOLDER", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("length", "changed"), [(10, False), (67, False), (68, True), (200, True)])
def test_another_folder_is_taken_where_a_socket_would_not_fit(
    length: int, changed: bool, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~/.ansible/cp adds 12 bytes to the home's path, and a socket 28: 107 in all with 67."""
    monkeypatch.setenv("HOME", "/" + "h" * (length - 1))
    found = settings()
    assert bool(found) is changed
    if changed:
        folder = Path(found[VARIABLE])
        assert folder.parent == short and folder.stat().st_mode & 0o777 == 0o700
        assert settings() == found


def test_a_path_of_107_bytes_is_the_longest() -> None:
    with socket.socket(socket.AF_UNIX) as one, pytest.raises(OSError, match="too long"):
        one.bind("/" + "x" * 107)
    assert control_sockets.fits(Path("/" + "x" * 78)) and not control_sockets.fits(Path("/" + "x" * 79))


def test_what_the_user_gave_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/" + "h" * 200)
    monkeypatch.setenv(VARIABLE, "/run/cp")
    assert settings() == {}
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("ANSIBLE_HOME", "/srv/a")
    assert settings() == {}


@pytest.mark.parametrize("kind", ["link", "open to all", "file"])
def test_a_folder_that_somebody_else_could_write_to_is_not_taken(
    kind: str, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/" + "h" * 200)
    folder = short / f"mixtral-run-{os.getuid()}"
    if kind == "link":
        (short / "other").mkdir(mode=0o700)
        folder.symlink_to(short / "other")
    elif kind == "file":
        folder.write_text("")
    else:
        folder.mkdir()
        folder.chmod(0o777)
    found = Path(settings()[VARIABLE])
    assert found != folder and not found.is_symlink() and found.stat().st_mode & 0o777 == 0o700
