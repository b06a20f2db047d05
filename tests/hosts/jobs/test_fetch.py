"""Files that `fetch` leaves on the operator's machine, from a simulated host over a real sshd."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.jobs.fetch import fetch_job
from mixtral_run.fleet.jobs.job_spec import JobOptions
from tests.hosts.conftest import HostMaker


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

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        fetch_job(f"{target}:{adapter}", Path(), overwrite=True)
    assert (work / "adapter/weights").read_text() == "first"
    assert sorted(each.name for each in work.iterdir()) == ["adapter", "mine.txt"]


def test_a_path_of_the_container_is_found_on_the_host(light_hosts: HostMaker, work: Path, tmp_path: Path) -> None:
    target, adapter = host_and_adapter(light_hosts, tmp_path)
    folders = JobOptions(checkpoints_folder=str(adapter.parent))
    fetch_job(f"{target}:/checkpoints/adapter", Path("here"), folders=folders)
    assert (work / "here/weights").read_text() == "first"
