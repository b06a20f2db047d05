"""Size of the swap file, changes of the size, and refusals in words. Real swap is tested in the scenario."""

import os
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("swap_file")
READ = MODULE.probe.read_text
PAGE = os.sysconf("SC_PAGE_SIZE")


class Machine:
    """STAND-IN for kernel and programs: what is switched on, what was run, and a table of mounts."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.filesystem, self.path = folder, "ext4", folder / "swapfile"
        self.on: list[str] = []
        self.refuses = ""
        monkeypatch.setattr(MODULE, "FSTAB", str(folder / "fstab"))
        monkeypatch.setattr(MODULE, "SYSCTL", str(folder / "sysctl"))
        monkeypatch.setattr(MODULE, "run", self.run)
        monkeypatch.setattr(MODULE.probe, "swap_files", lambda: [{"path": path} for path in self.on])
        monkeypatch.setattr(MODULE.probe, "disk", lambda _: {"free_gib": 200.0})
        monkeypatch.setattr(MODULE.probe, "read_text", self.read)

    def read(self, path: str, default: str | None = None) -> str | None:
        if path == "/proc/self/mounts":
            return f"/dev/sda1 / ext4 rw 0 0\nsomething {self.folder} {self.filesystem} rw 0 0\n"
        return READ(path, default)

    def run(self, argv: list[str], **_: object) -> Result:
        path = argv[-1]
        if argv[0] == self.refuses:
            return Result(1, "", f"{argv[0]}: refused")
        if argv[0] == "fallocate":
            # Sparse: of what lies in it only the signature counts here.
            os.truncate(path, int(argv[2][:-1]) << 20)
        elif argv[0] == "mkswap":
            with Path(path).open("r+b") as file:
                file.seek(PAGE - 10)
                file.write(b"SWAPSPACE2")
        elif argv[0] == "swapon":
            self.on.append(path)
        elif argv[0] == "swapoff" and path in self.on:
            self.on.remove(path)
        return Result(0, "", "")

    def call(self, **more: object) -> dict:
        return call_module(MODULE, self.folder / "records", host="gpu-01", path=str(self.path), **more)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("ram", "size", "target", "mib"),
    [(64.0, -1, 128, 65536), (62.7, -1, 128, 66 * 1024), (125.4, -1, 128, 0), (503.6, -1, 128, 0), (64.0, 0, 128, 0),
     (64.0, 0.5, 128, 512), (64.0, -1, 64, 0)],
)  # fmt: skip
def test_by_default_it_is_what_ram_lacks(
    monkeypatch: pytest.MonkeyPatch, ram: float, size: float, target: float, mib: int
) -> None:
    monkeypatch.setattr(MODULE.probe, "memory", lambda: {"ram_gib": ram, "swap_gib": 0.0})
    assert MODULE._wanted_mib({"size_gib": size, "target_gib": target}) == mib


def test_it_is_made_resized_and_with_0_taken_away(machine: Machine) -> None:
    for size in (1, 1.5, 0.5):
        assert machine.call(size_gib=size)["size_gib"] == size
        assert machine.path.stat().st_size == size * 2**30 and machine.path.stat().st_mode & 0o777 == 0o600
        assert machine.on == [str(machine.path)]
        assert (machine.folder / "fstab").read_text() == f"{machine.path} none swap sw 0 0\n"
        assert not machine.call(size_gib=size)["changed"]
    assert machine.call(size_gib=0)["changed"] and not machine.path.exists() and machine.on == []
    assert (machine.folder / "fstab").read_text() == ""
    assert not machine.call(size_gib=0)["changed"]


def test_swap_in_use_that_does_not_fit_into_ram_stays_as_it_was(machine: Machine) -> None:
    machine.call(size_gib=1)
    machine.refuses = "swapoff"
    result = machine.call(size_gib=2)
    assert result["failed"] and "swapoff: refused" in result["msg"] and "swap is in use" in result["msg"]
    assert machine.on == [str(machine.path)] and machine.path.stat().st_size == 2**30
    assert not (machine.folder / "swapfile.new").exists()


@pytest.mark.parametrize("filesystem", ["tmpfs", "zfs", "overlay", "nfs4"])
@pytest.mark.parametrize("check_mode", [False, True])
def test_a_filesystem_that_takes_no_swap_is_reported_before_anything_is_written(
    machine: Machine, filesystem: str, check_mode: bool
) -> None:
    machine.filesystem = filesystem
    before = sorted(machine.folder.iterdir())
    result = machine.call(size_gib=1, check_mode=check_mode)
    assert result["failed"]
    for words in (
        f"gpu-01: {machine.path}", "ext4, xfs or btrfs",
        f"{machine.folder} is on {filesystem}, which takes no swap file",
        "put swap_path on a disk with one of these, or set swap_size_gib: 0",
    ):  # fmt: skip
        assert words in result["msg"]
    assert sorted(machine.folder.iterdir()) == before
    assert not machine.call(size_gib=0, check_mode=check_mode).get("failed")


def test_a_file_that_is_not_the_kits_is_left(machine: Machine) -> None:
    machine.path.write_text("somebody's")
    result = machine.call(size_gib=1)
    assert "the file is not the kit's" in result["msg"] and machine.path.read_text() == "somebody's"
