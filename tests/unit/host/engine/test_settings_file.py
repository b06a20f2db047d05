"""What the docker role would refuse later is refused before the engine is replaced, with the place of the mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.engine import engine_unit, settings_file

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("engine_conflicts")
DEFAULTS = {"log-opts": {"max-size": "100m"}, "default-ulimits": {}, "registry-mirrors": []}


@pytest.fixture
def file(programs: Programs, tmp_path: Path) -> Path:  # noqa: F811
    for name in ("systemctl", "dpkg-query"):
        programs.put(name)
    programs.put("dockerd", "echo unknown")
    return tmp_path / "daemon.json"


def _call(file: Path, **more: object) -> dict:
    return call_module(MODULE, file.parent / "records", section="docker", path=str(file), defaults=DEFAULTS, **more)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{\n  "debug": true,\n}', "broken JSON in line 3, column 1: "),
        (b"{,}", "broken JSON in line 1, column 2: "),
        (b"[]", "a list in line 1: []"),
        (b"null", "a constant in line 1: null"),
        (b'"x"', 'a text in line 1: "x"'),
        (b"{}\n\xff", "bytes that are not UTF-8, in line 2"),
        (b"[" * 100_000, "JSON that cannot be read"),
        (b'{"log-opts": []}', "found a list: []"),
        (b'{"runtimes": "nvidia"}', 'found a text: "nvidia"'),
        (b'{"registry-mirrors": "https://m"}', 'found a text: "https://m"'),
    ],
)
def test_a_file_that_settings_cannot_be_merged_into_is_refused_with_its_place(
    file: Path, content: bytes, found: str
) -> None:
    file.write_bytes(content)
    result = _call(file)
    assert result["failed"] and "nothing was changed" in result["msg"]
    assert found in result["msg"] and str(file) in result["msg"] and "expected" in result["msg"]
    assert f"sudo python3 -m json.tool {file}" in result["msg"] and "run the same command again" in result["msg"]


@pytest.mark.parametrize("content", [b"", b" \n", b"{}", b'{"debug": true, "log-opts": {"labels": "x"}}'])
def test_a_usable_file_is_no_conflict(file: Path, content: bytes) -> None:
    assert not _call(file).get("failed")
    file.write_bytes(content)
    assert not _call(file).get("failed")


def test_a_folder_or_a_link_into_nowhere_is_refused(file: Path) -> None:
    file.symlink_to("gone")
    assert "found a link to gone, which does not exist" in _call(file)["msg"]
    file.unlink()
    file.mkdir()
    assert "found a folder" in _call(file)["msg"] and f"sudo mv {file}" in _call(file)["msg"]


def test_the_engine_that_is_there_judges_its_own_file(file: Path, programs: Programs) -> None:  # noqa: F811
    file.write_text('{"wrong": 1}')
    script = '[ "$1" != --help ] || { echo "  --validate"; exit 0; }'
    programs.put("dockerd", script, "echo 'directives do not match: wrong' >&2; exit 1")
    assert "found directives do not match: wrong" in _call(file)["msg"]
    assert programs.calls("dockerd --validate") == [f"dockerd --validate --config-file {file}"]
    programs.put("dockerd", script)
    assert not _call(file).get("failed")


def test_other_refusals_of_the_role_come_before_the_first_change(file: Path) -> None:
    result = _call(file, users=["root", "nobody-of-this-name"], unusable=["docker_proxy"])
    assert "no user 'nobody-of-this-name'" in result["msg"] and "docker_users" in result["msg"]
    assert "correct docker_proxy" in result["msg"] and len(result["conflicts"]) == 2


def test_a_folder_that_is_mounted_read_only_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_file.os, "access", lambda *_: False)
    assert "a file system that is mounted read-only" in _call(file)["msg"]


def test_what_is_replaced_is_announced_with_its_versions_and_files(
    file: Path,
    programs: Programs,  # noqa: F811
    tmp_path: Path,
) -> None:
    programs.put("dpkg-query", "echo docker.io 20.10 installed; echo runc 1.1 config-files; echo other 1 installed")
    (tmp_path / "default").touch()
    given = {"conflicting": ["docker.io", "runc"], "config_files": [str(tmp_path / "default"), str(tmp_path / "none")]}
    (told,) = _call(file, **given)["announcements"]
    assert "found docker.io 20.10;" in told and "replaces these packages" in told
    assert f"the files {tmp_path}/default are recorded, and teardown puts them back" in told
    (told,) = _call(file, **given, restore=False)["announcements"]
    assert "teardown does not put them back" in told
    programs.put("dpkg-query", "echo docker.io 20.10 config-files")
    assert _call(file, **given)["announcements"] == []


def test_rootless_docker_is_no_announcement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_unit, "run", lambda *_: Result(1, "", ""))
    assert engine_unit.announcements([("warn", "one engine", "rootless Docker", "it stays")]) == []
