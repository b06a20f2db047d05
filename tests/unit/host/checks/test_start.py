"""The kit's modules on hosts with a strict umask, read-only mounts and file servers that distrust root."""

import ast
import errno
import os
import stat
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import commands, files, start

from tests.unit.host.conftest import ROOT, call_module, load_module

FOLDERS = load_module("owned_folders")
READING = {"host_state", "preflight", "role_arguments", "spread_plan"}
"""Modules that change nothing."""


@pytest.fixture(params=[0o027, 0o077])
def umask(request: pytest.FixtureRequest):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_folders_and_files_have_their_modes_under_any_umask(umask: None, tmp_path: Path) -> None:
    paths = {"uid": os.geteuid(), "gid": os.getegid()}
    call_module(FOLDERS, tmp_path / "records", section="x", paths=[str(tmp_path / "a/b/c")], mode="2775", **paths)
    modes = {name: oct(stat.S_IMODE((tmp_path / name).stat().st_mode)) for name in ("a", "a/b", "a/b/c", "records")}
    assert modes == {"a": "0o755", "a/b": "0o755", "a/b/c": "0o2775", "records": "0o755"}
    # apt's own user reads the key.
    source = load_module("apt_source")
    source.write_text(str(tmp_path / "keyrings/docker.asc"), "key")
    assert stat.S_IMODE((tmp_path / "keyrings").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "keyrings/docker.asc").stat().st_mode) == 0o644


@pytest.mark.parametrize("path", sorted((ROOT / "plugins/modules").glob("*.py")), ids=lambda path: path.stem)
def test_every_module_that_changes_a_host_starts_in_the_same_way(path: Path) -> None:
    calls = {node.func.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name)}  # fmt: skip
    assert ("run_module" in calls) is (path.stem not in READING)


@pytest.mark.parametrize(
    ("number", "filesystem", "words"),
    [
        (errno.EROFS, "ext4", "mount it writable"),
        (errno.EPERM, "nfs4", "root_squash"),
        (errno.EACCES, "nfs", "root_squash"),
        (errno.EPERM, "ext4", "lsattr -d /srv/x"),
        (errno.ENOSPC, "ext4", "free some space"),
        (errno.EDQUOT, "ext4", "quota"),
    ],
)
def test_a_refusal_of_the_system_has_path_and_next_step(
    monkeypatch: pytest.MonkeyPatch, number: int, filesystem: str, words: str
) -> None:
    monkeypatch.setattr(start, "_filesystem", lambda _: filesystem)
    message = start.refusal(OSError(number, os.strerror(number), "/srv/x"))
    assert "/srv/x" in message and filesystem in message and os.strerror(number) in message and words in message


def test_refusals_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "_filesystem", lambda path: {"/srv/x": "ext4", "/net/x": "fuse.sshfs"}[path])
    assert start.refusal(OSError(errno.EIO, "Input/output error", "/srv/x")) == (
        "The host refuses a change of a file or folder.\n  where:    /srv/x (ext4)\n  found:    Input/output error\n"
        "  next:     the disk fails: see `dmesg`"
    )
    assert "no_root_squash" in start.refusal(OSError(errno.EACCES, "Permission denied", "/net/x"))
    # Without a path, or with a part of one, nothing is known about its file system.
    for path in (None, b"/srv/x", "x"):
        text = start.refusal(OSError(errno.EPERM, "Operation not permitted", path))
        assert ("where" in text) is (path == "x") and f"lsattr -d {'x' if path == 'x' else 'PATH'}" in text
    assert start.refusal(OSError("odd")).endswith("found:    odd")


def test_the_last_lines_of_a_program() -> None:
    result = commands.Result(1, "\n".join(map(str, range(20))), "error  \n")
    assert commands.last_lines(result) == "13\n14\n15\n16\n17\n18\n19\nerror"
    assert commands.last_lines(result, 1) == "error" and commands.last_lines(commands.Result(0, "", "")) == ""


def test_the_environment_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    monkeypatch.delenv("DEBIAN_FRONTEND", raising=False)
    script = 'printf "%s|%s|%s|%s|" "$LC_ALL" "$DEBIAN_FRONTEND" "$A" "${PATH#"$B"}"; cat; echo e >&2; exit 3'
    given = {"A": "1", "B": os.environ["PATH"]}
    found = commands.run(["sh", "-c", script], stdin=b"in", environment=given)
    assert found == (3, "C|noninteractive|1|:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin|in", "e\n")
    assert commands.run(["cat"]) == (0, "", "")
    assert commands.run(["no-such"]) == (127, "", "no-such: not installed")
    assert commands.run(["sleep", "9"], timeout=0.01) == (124, "", "sleep: no answer within 0.01 s")


@pytest.mark.parametrize("function", ["fchown", "mkdir", "open"])
def test_a_module_reports_what_the_system_refuses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str
) -> None:
    real = getattr(os, function)

    def refuse(*words, **more):
        if function == "open" and not words[1] & os.O_CREAT:
            return real(*words, **more)
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, function, refuse)
    folder = tmp_path / "checkpoints"
    more = {"secret_path": str(tmp_path / "token"), "secret": "hf_x"} if function == "open" else {}
    paths = [] if function == "open" else [str(folder)]
    result = call_module(FOLDERS, tmp_path, section="x", paths=paths, uid=0, gid=4321, **more)
    assert result["failed"] and "The host refuses a change of a file or folder." in result["msg"]
    named = {"fchown": folder, "mkdir": folder, "open": tmp_path}
    assert result["blame"] == "me", "a host that gives files is not to blame for what this one refuses"
    assert str(named[function]) in result["msg"] and "Operation not permitted" in result["msg"]


def test_a_file_that_somebody_linked_is_not_written_through_a_folder_of_another_user(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a link to another user")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    os.lchown(tmp_path / "link", 4321, 4321)
    with pytest.raises(OSError, match="does not belong to root"):
        files.rewrite(str(tmp_path / "link/file"), "new")
    assert (tmp_path / "theirs/file").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("hf_abc", "hf_abc\n"),
        ("\ufeffhf_abc\r\n", "hf_abc\n"),
        (' "hf_abc"\n', "hf_abc\n"),
        ("'hf_abc'", "hf_abc\n"),
        ("hf_abc hf_def", None),
        ("HF_TOKEN=hf_abc", None),
        ("hf_\u200babc", None),
        ('hf_"abc', None),
    ],
)
def test_a_token_is_written_without_what_editors_add_or_refused(tmp_path: Path, text: str, written: str | None) -> None:
    file = tmp_path / "home/token"
    settings = {"section": "x", "paths": [], "uid": os.geteuid(), "gid": os.getegid(), "secret_path": str(file)}
    result = call_module(FOLDERS, tmp_path / "records", secret=text, **settings)
    assert bool(result.get("failed")) is (written is None)
    if written is None:
        assert not file.exists() and "hf_abc" not in result["msg"] and "next:" in result["msg"]
        return
    assert file.read_text() == written and result["changed"]
    assert not call_module(FOLDERS, tmp_path / "records", secret=text, **settings)["changed"]
    assert call_module(FOLDERS, tmp_path / "records", secret="hf_other", **settings)["changed"]


def test_a_program_that_this_user_may_not_run_counts_as_missing(tmp_path: Path) -> None:
    """Root may run a program only if somebody may; another user also meets folders of PATH that are closed."""
    (tmp_path / "odd-program").write_text("#!/bin/sh\n")
    (tmp_path / "odd-program").chmod(0o644)
    found = commands.run(["odd-program"], environment={"PATH": f"{tmp_path}:/usr/bin"})
    assert found == (127, "", "odd-program: not installed, or this user may not run it")
