"""Files that `fetch` leaves on the operator's machine, from a simulated host over a real sshd."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.jobs.fetch import fetch_job
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.testhosts.engine import install_packages
from tests.hosts.conftest import HostMaker
from tests.support.needs import missing


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the current folder of the user, with one of the user's files in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    monkeypatch.chdir(folder)
    return folder


def host_and_adapter(light_hosts: HostMaker, tmp_path: Path) -> tuple[str, Path]:
    (host,) = light_hosts(1)
    adapter = tmp_path / "on the host/adapter"
    adapter.mkdir(parents=True)
    (adapter / "weights").write_text("first")
    return host.target, adapter


def test_overwrite_replaces_what_has_that_name_and_nothing_else(
    light_hosts: HostMaker, work: Path, tmp_path: Path
) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    for word in ("first", "second"):
        (adapter / "weights").write_text(word)
        assert fetch_job(f"{target}:{adapter}", Path(), overwrite=True) == [Path("adapter")]
        assert (work / "adapter/weights").read_text() == word
        assert (work / "mine.txt").read_text() == "mine"
        assert sorted(each.name for each in work.iterdir()) == ["adapter", "mine.txt"]


def test_what_is_there_stays_when_nothing_comes(light_hosts: HostMaker, work: Path, tmp_path: Path) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    (work / "other").write_text("old")
    with pytest.raises(ConfigError, match="already"):
        fetch_job(f"{target}:{adapter}", work / "other")
    with pytest.raises(HostError):
        fetch_job(f"{target}:{adapter.with_name('other')}", work, overwrite=True)
    assert (work / "other").read_text() == "old"
    assert sorted(each.name for each in work.iterdir()) == ["mine.txt", "other"]


def test_what_is_there_is_put_back_when_it_is_stopped_in_the_middle(
    light_hosts: HostMaker, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    fetch_job(f"{target}:{adapter}", Path())
    rename = Path.rename

    def stopped(path: Path, to: Path) -> Path:
        if path.parent.name == "new":
            raise KeyboardInterrupt
        return rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", stopped)
        fetch_job(f"{target}:{adapter}", Path(), overwrite=True)
    assert (work / "adapter/weights").read_text() == "first"
    (adapter / "weights").write_text("second")
    fetch_job(f"{target}:{adapter}", work, overwrite=True)
    assert (work / "adapter/weights").read_text() == "second"
    assert sorted(each.name for each in work.iterdir()) == ["adapter", "mine.txt"]


def test_a_path_of_the_container_is_found_on_the_host(light_hosts: HostMaker, work: Path, tmp_path: Path) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    folders = JobOptions(checkpoints_folder=str(adapter.parent))
    fetch_job(f"{target}:/checkpoints/adapter", Path("here"), folders=folders)
    assert (work / "here/weights").read_text() == "first"


@pytest.fixture
def rsync_installed() -> None:
    if shutil.which("rsync") is None and os.geteuid() == 0 and Path("/usr/bin/apt-get").exists():
        install_packages("rsync")
    if shutil.which("rsync") is None:
        missing("no rsync here, and only root can install one")


def test_an_interrupted_fetch_continues(
    light_hosts: HostMaker, work: Path, tmp_path: Path, rsync_installed: None
) -> None:
    (host,) = light_hosts(1)
    peft = tmp_path / "on the host/a 'peft'"
    (peft / "sub").mkdir(parents=True)
    contents = {"large": random.Random(0).randbytes(8 << 20), "sub/$(x) small": b"small", "#first": b""}
    for name, content in contents.items():
        (peft / name).write_bytes(content)
    (peft / "link").symlink_to("large")
    program, sent = host.programs / "rsync", tmp_path / "sent"
    real = shutil.which("rsync")
    head = f'#!/bin/sh\ncase "$1" in --version) exec {real} "$@";; esac\n'
    program.write_text(f'{head}{real} "$@" | {{ stdbuf -o0 head -c 5000000; kill -9 0; }}\n')
    program.chmod(0o755)
    said: list[str] = []
    with pytest.raises(HostError) as caught:
        fetch_job(f"{host.target}:{peft}", work, say=said.append)
    (left,) = work.glob(".mixtral-run-fetch-*")
    assert str(left) in said[-1] and caught.value.next_command == "the same command, which continues"
    assert not (work / peft.name).exists()

    program.write_text(f'{head}{real} "$@" | tee {sent}\n')
    said.clear()
    fetch_job(f"{host.target}:{peft}", work, say=said.append)
    assert {name: (work / peft.name / name).read_bytes() for name in contents} == contents
    assert (work / peft.name / "link").readlink() == Path("large")
    assert "MiB are here from an earlier fetch" in said[0] and "3 files, 8.0 MiB" in said[0]
    assert sent.stat().st_size < 5_000_000
    assert sorted(each.name for each in work.iterdir()) == ["a 'peft'", "mine.txt"]


def test_without_rsync_on_the_host_it_comes_whole_or_not_at_all_and_that_is_said(
    light_hosts: HostMaker, work: Path, tmp_path: Path, rsync_installed: None
) -> None:
    (host,) = light_hosts(1)
    (host.programs / "rsync").write_text("#!/bin/sh\nexit 127\n")
    (host.programs / "rsync").chmod(0o755)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/a").write_text("a")
    said: list[str] = []
    fetch_job(f"{host.target}:{tmp_path}/peft", work, say=said.append)
    assert "rsync is not installed on 127.0.0.1" in said[0] and "begins anew" in said[0]
    assert (work / "peft/a").read_text() == "a"
    assert sorted(each.name for each in work.iterdir()) == ["mine.txt", "peft"]


def test_a_folder_that_others_could_write_to_is_not_continued(
    light_hosts: HostMaker, work: Path, tmp_path: Path, rsync_installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    monkeypatch.setattr("mixtral_run.fleet.jobs.fetch._receive", lambda *_: pytest.fail("not by tar"))
    monkeypatch.setattr("mixtral_run.fleet.jobs.transfer.rsync.rsync_argv", lambda *_: ["false"])
    with pytest.raises(HostError):
        fetch_job(f"{target}:{adapter}", work)
    (left,) = work.glob(".mixtral-run-fetch-*")
    left.chmod(0o770)
    with pytest.raises(ConfigError, match="may have been written to by others"):
        fetch_job(f"{target}:{adapter}", work)
