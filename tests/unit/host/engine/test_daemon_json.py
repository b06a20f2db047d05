"""daemon.json is written only when the engine finds it valid, and kept as it was; check mode shows the change."""

import json
import os
import stat
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("daemon_json")
THEIRS = '{"debug": true}'


@pytest.fixture
def file(programs: Programs, tmp_path: Path) -> Path:  # noqa: F811
    """The file as somebody wrote it, beside an engine that validates and takes everything but the key `wrong`."""
    programs.put("systemctl")
    programs.put(
        "dockerd",
        '[ "$1" != --help ] || { echo "      --validate   Validate daemon configuration and exit"; exit 0; }',
        '[ "$1 $2" = "--validate --config-file" ] || exit 2',
        'if grep -q wrong "$3"; then echo "unable to configure: the following directives: wrong" >&2; exit 1; fi',
    )
    path = tmp_path / "docker/daemon.json"
    path.parent.mkdir()
    path.write_text(THEIRS)
    return path


def _call(file: Path, check_mode: bool = False, **more: object) -> dict:
    return call_module(MODULE, file.parents[1] / "records", check_mode, section="docker", path=str(file), **more)


def _files(file: Path) -> dict[str, str]:
    return {
        path.name: path.read_text() for folder in ("docker", "records") for path in (file.parents[1] / folder).glob("*")
    }


def test_what_the_engine_refuses_is_not_written(file: Path) -> None:
    result = _call(file, settings={"wrong": 1})
    assert result["failed"] and "The engine refuses the merged settings" in result["msg"]
    assert str(file) in result["msg"] and "directives: wrong" in result["msg"] and "next:" in result["msg"]
    assert _files(file) == {"daemon.json": THEIRS}


def test_check_mode_shows_the_change_and_makes_none(file: Path) -> None:
    result = _call(file, check_mode=True, settings={"live-restore": True})
    assert result["changed"] and result["diff"]["before"] == THEIRS
    assert json.loads(result["diff"]["after"]) == {"debug": True, "live-restore": True}
    assert _files(file) == {"daemon.json": THEIRS}


def test_the_file_as_it_was_is_kept_until_the_kit_leaves(file: Path) -> None:
    for value in (True, False):
        assert _call(file, settings={"live-restore": value})["due"] == "reload"
        assert not _call(file, settings={"live-restore": value})["changed"]
    assert _files(file)["daemon.json.mixtral-run.bak"] == THEIRS
    _call(file, state="absent")
    assert json.loads(file.read_text()) == json.loads(THEIRS)
    assert "daemon.json.mixtral-run.bak" not in _files(file)


def test_a_file_that_only_the_kit_wrote_goes_with_it(file: Path) -> None:
    file.unlink()
    _call(file, settings={"live-restore": True})
    assert json.loads(file.read_text()) == {"live-restore": True}
    _call(file, state="absent")
    assert not file.exists()


UNIT = (
    "ExecStart={{ path=/usr/bin/dockerd ; argv[]=/usr/bin/dockerd -H fd:// {flags} ; ignore_errors=no ; pid=0 }}\n"
    "FragmentPath=/lib/systemd/system/docker.service\n"
)


def test_what_the_unit_says_is_not_repeated_and_the_check_of_the_engine_gets_its_flags(
    file: Path,
    programs: Programs,  # noqa: F811
) -> None:
    programs.put("systemctl", f"cat <<'END'\n{UNIT.format(flags='--log-driver=journald')}END")
    defaults = {"log-driver": "json-file", "live-restore": True}
    result = _call(file, defaults=defaults)
    assert json.loads(file.read_text()) == {"debug": True, "live-restore": True}
    assert result["kept"] == ["the unit's flag --log-driver=journald"]
    assert programs.calls("dockerd --validate")[0].endswith("-H fd:// --log-driver=journald")
    assert not _call(file, defaults=defaults)["changed"]


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_flag_that_contradicts_a_setting_is_refused_before_anything_is_written(
    file: Path,
    programs: Programs,  # noqa: F811
    check_mode: bool,
) -> None:
    programs.put("systemctl", f"cat <<'END'\n{UNIT.format(flags='--data-root=/old --debug')}END")
    result = _call(file, check_mode=check_mode, settings={"data-root": "/data"})
    assert result["failed"] and "nothing was changed" in result["msg"]
    assert "--data-root=/old" in result["msg"] and "debug in one place only" in result["msg"]
    assert _files(file) == {"daemon.json": THEIRS}


def test_link_mode_owner_and_attributes_of_the_file_stay(file: Path, tmp_path: Path) -> None:
    managed = tmp_path / "managed/daemon.json"
    managed.parent.mkdir()
    file.rename(managed)
    file.symlink_to(managed)
    managed.chmod(0o600)
    if os.geteuid() == 0:
        os.chown(managed, 0, 4321)
    labelled = True
    try:
        os.setxattr(managed, "user.label", b"theirs")
    except OSError:
        labelled = False  # a file system without extended attributes
    group = managed.stat().st_gid
    _call(file, settings={"live-restore": True})
    assert file.is_symlink() and json.loads(managed.read_text())["live-restore"] is True
    now = managed.stat()
    assert (stat.S_IMODE(now.st_mode), now.st_gid) == (0o600, group)
    assert not labelled or os.getxattr(managed, "user.label") == b"theirs"
    assert stat.S_IMODE(file.with_name("daemon.json.mixtral-run.bak").stat().st_mode) == 0o600
    _call(file, state="absent")
    assert file.is_symlink() and json.loads(managed.read_text()) == json.loads(THEIRS)


def test_a_file_that_is_no_json_is_left_and_reported(file: Path) -> None:
    file.write_text("{,}")
    result = _call(file, settings={"live-restore": True})
    assert result["failed"] and "broken JSON in line 1, column 2" in result["msg"] and str(file) in result["msg"]
    assert _files(file) == {"daemon.json": "{,}"}
