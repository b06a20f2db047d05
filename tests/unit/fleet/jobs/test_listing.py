"""What a host lists for `fetch` before it sends anything, and what it then sends, is checked by name, kind and size."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path, PurePosixPath

import pytest

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.transfer import listing as module
from mixtral_run.fleet.jobs.transfer import rsync
from mixtral_run.fleet.jobs.transfer.links import RefusedError
from mixtral_run.fleet.jobs.transfer.listing import Listing, read_listing
from mixtral_run.fleet.ssh.connection import Ssh
from tests.unit.fleet.hostile_tar import CASES, FILE, FOLDER, HARD, LINK, PEFT, Entry

KINDS = {FILE: "f", LINK: "l", FOLDER: "d", tarfile.FIFOTYPE: "p", tarfile.CHRTYPE: "c"}
# find lists a hard link as the file that it is.
NOT_LISTED = [name for name, entries in CASES.items() if any(entry[1] == HARD for entry in entries)]


def listed(entries: list[Entry], size: str | None = None) -> bytes:
    """The list that find prints of some entries; the size of a file is that of its content."""
    words = ["rsync"]
    for name, kind, *rest in entries:
        content = rest[0] if rest else b""
        target = content if kind == LINK else ""
        words += [KINDS[kind], size or str(len(content)), "644", "1700000000.5", f"./{name}", str(target)]
    return b"".join(os.fsencode(word) + b"\0" for word in words)


def read(data: bytes) -> Listing:
    found = read_listing(io.BytesIO(data), "peft")
    assert found is not None
    return found


def good() -> Listing:
    return read(listed([PEFT, ("peft/a", FILE, b"four"), ("peft/sub", FOLDER), ("peft/sub/l", LINK, "../a")]))


def test_a_folder_is_read_as_it_is() -> None:
    found = good()
    assert {str(path): file.num_bytes for path, file in found.files.items()} == {"peft/a": 4}
    assert {str(path) for path in found.folders} == {"peft", "peft/sub"}
    assert {str(path): target for path, target in found.links.targets.items()} == {"peft/sub/l": "../a"}
    assert (found.amount.num_files, found.amount.num_bytes) == (1, 4)


def test_a_host_without_rsync_prints_nothing() -> None:
    assert read_listing(io.BytesIO(), "peft") is None


@pytest.mark.parametrize("case", sorted(set(CASES) - set(NOT_LISTED)))
def test_a_hostile_list_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        read(listed(CASES[case]))


@pytest.mark.parametrize(
    "data",
    [
        b"no list", b"other\0", listed([PEFT])[:-1], listed([PEFT]) + b"f\0", listed([PEFT], "x"), listed([PEFT], "-1"),
        listed([PEFT]).replace(b"1700000000.5", b"yesterday"), listed([PEFT]).replace(b"644", b"9"),
    ],
)  # fmt: skip
def test_a_damaged_list_is_refused(data: bytes) -> None:
    with pytest.raises(RefusedError):
        read(data)


def test_a_list_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    read(listed([PEFT, ("peft/a", FILE, b"")]))
    with pytest.raises(RefusedError, match="more than 2"):
        read(listed([PEFT, ("peft/a", FILE, b""), ("peft/b", FILE, b"")]))
    monkeypatch.setattr(module, "MAX_LIST_BYTES", 20)
    with pytest.raises(RefusedError, match="longer than 20 bytes"):
        read(listed([PEFT]))


def arrived(folder: Path) -> Path:
    (folder / "peft/sub").mkdir(parents=True)
    (folder / "peft/a").write_bytes(b"four")
    return folder


def test_what_arrived_as_listed_gets_its_links_and_modes(tmp_path: Path) -> None:
    arrived(tmp_path)
    found = read(listed([PEFT, ("peft/a", FILE, b"four"), ("peft/sub", FOLDER), ("peft/sub/l", LINK, "../a")]))
    found.check_arrived(tmp_path)
    found.complete(tmp_path)
    assert (tmp_path / "peft/sub/l").readlink() == Path("../a")
    assert (tmp_path / "peft/a").stat().st_mode & 0o7777 == 0o644
    assert (tmp_path / "peft/sub").stat().st_mtime == 1700000000.5


@pytest.mark.parametrize("case", ["longer", "shorter", "missing", "more", "link", "folder link"])
def test_what_arrived_and_was_not_listed_is_refused(tmp_path: Path, case: str) -> None:
    file = arrived(tmp_path) / "peft/a"
    if case in ("longer", "shorter"):
        file.write_bytes(b"fours" if case == "longer" else b"fou")
    elif case == "more":
        file.with_name("b").touch()
    else:
        file.unlink()
    if case == "link":
        file.symlink_to("/etc/passwd")
    if case == "folder link":
        file.write_bytes(b"four")
        (tmp_path / "peft/sub").rmdir()
        (tmp_path / "peft/sub").symlink_to("/etc")
    with pytest.raises(RefusedError, match=r"changed while|not in the list|did not arrive"):
        good().check_arrived(tmp_path)


def test_what_is_left_of_another_state_is_removed_before_a_fetch_continues(tmp_path: Path) -> None:
    arrived(tmp_path)
    (tmp_path / "peft/old").mkdir()
    (tmp_path / "peft/old/x").touch()
    (tmp_path / "peft/part").symlink_to("/etc/passwd")
    (tmp_path / "peft/a").write_bytes(b"fo")
    found = good()
    found.remove_others(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"peft", "peft/a", "peft/sub"}
    assert found.received(tmp_path) == (2, None)
    (tmp_path / "peft/a").write_bytes(b"fours")
    assert found.received(tmp_path) == (4, PurePosixPath("peft/a"))
    found.remove_others(tmp_path)
    assert not (tmp_path / "peft/a").exists()


def test_names_never_reach_a_command_line_and_words_of_ssh_stay_whole() -> None:
    host = parse_host("ops@gpu-01:2222")
    argv = rsync.rsync_argv(host, PurePosixPath("/a b/$(x)"), Path("/here"), Path("/state of me/known_hosts"))
    assert argv[-3:] == ["--", "gpu-01:/a b/$(x)/", "/here/"]
    assert {"--files-from=-", "--from0", "--protect-args", "--no-links", "--inplace"} <= set(argv)
    shell = argv[argv.index("--rsh") + 1]
    assert "'-o' 'StrictHostKeyChecking=accept-new'" in shell and "'-p' '2222' '-l' 'ops'" in shell
    assert '"/state of me/known_hosts"' in shell and "gpu-01" not in shell


def test_a_host_that_sends_more_than_it_listed_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = tmp_path / "bin/rsync"
    endless.parent.mkdir()
    endless.write_text('#!/bin/sh\nfor last; do :; done\ncat >/dev/null\nexec cat /dev/zero > "$last/peft/a"\n')
    endless.chmod(0o755)
    monkeypatch.setenv("PATH", f"{endless.parent}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="evil sends more than it listed"):
        rsync.receive(Ssh(tmp_path / "k"), parse_host("evil"), PurePosixPath("/x"), good(), tmp_path, lambda _: None)


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("rsync  version 3.2.7  protocol version 31", None),
        ("rsync  version v3.4.1  protocol version 32", None),
        ("rsync  version 3.2.4  protocol version 31", "is not version 3.2.5 or newer"),
        ("openrsync: protocol version 29", "is not version 3.2.5 or newer"),
        (None, "is not installed here"),
    ],
)
def test_an_rsync_that_takes_unrequested_files_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str | None, reason: str | None
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if printed is not None:
        (tmp_path / "rsync").write_text(f"#!/bin/sh\necho '{printed}'\n")
        (tmp_path / "rsync").chmod(0o755)
    found = rsync.why_not_here()
    assert found is None if reason is None else found is not None and reason in found
