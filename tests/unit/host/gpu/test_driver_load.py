"""Modules that are replaced and unloaded: what stood on them comes back, and services run again."""

import time
import types
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.gpu import driver_load

from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

ALL = ("nvidia_fs", "nvidia_peermem", "nvidia_drm", "nvidia_modeset", "nvidia_uvm", "nvidia")


class Kernel:
    """Loaded modules as folders, and programs that load and unload them."""

    def __init__(self, folder: Path, programs: Programs) -> None:  # noqa: F811
        self.folder, self.programs = folder, programs
        for name in ALL:
            (folder / name).mkdir(parents=True)
        programs.put("modprobe", f"mkdir -p {folder}/$(echo $1 | tr - _)")
        programs.put("rmmod", f"rmdir {folder}/$1")
        programs.put("nvidia-smi", "exit 0")
        programs.put("systemctl", '[ "$1 $2" = "is-active nvidia-persistenced" ] && echo active; exit 0')

    def loaded(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def kernel(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Kernel:  # noqa: F811
    monkeypatch.setattr(driver_load, "MODULES", str(tmp_path / "modules"))
    monkeypatch.setattr(driver_load, "in_use", lambda *_, **__: "")
    monkeypatch.setattr(driver_load.driver_parts, "nouveau_loaded", lambda: False)
    return Kernel(tmp_path / "modules", programs)


def test_modules_that_stand_on_the_drivers_come_back(kernel: Kernel) -> None:
    warnings: list[str] = []
    assert driver_load.reload("pcie", warnings.append) == "" and not warnings
    assert kernel.loaded() == set(ALL)
    assert "modprobe gdrdrv" not in kernel.programs.calls()  # it was not there
    assert kernel.programs.calls("systemctl st") == [
        "systemctl stop nvidia-persistenced", "systemctl start nvidia-persistenced",
    ]  # fmt: skip


def test_a_module_that_does_not_come_back_is_reported(kernel: Kernel) -> None:
    kernel.programs.put("modprobe", f"[ $1 = nvidia_fs ] && exit 1; mkdir -p {kernel.folder}/$(echo $1 | tr - _)")
    warnings: list[str] = []
    assert driver_load.reload("pcie", warnings.append) == ""
    assert len(warnings) == 1 and "nvidia_fs was loaded" in warnings[0]


def test_a_module_that_stays_brings_those_before_it_back(kernel: Kernel) -> None:
    kernel.programs.put("rmmod", f"[ $1 = nvidia_uvm ] && exit 1; rmdir {kernel.folder}/$1")
    assert "nvidia_uvm" in driver_load.reload("pcie", print)
    assert kernel.loaded() == set(ALL)


def test_services_run_again_if_the_modules_stay(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_load, "in_use", lambda: "the module nvidia is in use (1 times)")
    assert "in use" in driver_load.unload()
    assert kernel.programs.calls("systemctl st")[-1] == "systemctl start nvidia-persistenced"
    monkeypatch.setattr(driver_load, "in_use", str)
    assert driver_load.unload() == "" and kernel.loaded() == set()
    assert kernel.programs.calls("systemctl st")[-1] == "systemctl stop nvidia-persistenced"


@pytest.mark.parametrize(
    ("version", "wanted", "why"),
    [("580.173.02", "580.173.02", ""), ("580.173.02", None, ""), ("580.95.05", "580.173.02", "of version 580.95.05")],
)
def test_a_module_of_another_version_is_not_built(kernel: Kernel, version: str, wanted: str | None, why: str) -> None:
    kernel.programs.put("dkms", "exit 0")
    kernel.programs.put("modinfo", f"echo {version}")
    found = driver_load.build("k1", wanted)
    assert why in found and bool(found) == bool(why)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("Completed, Success", ""),
        ("In Progress, N/A", "GPU 0: In Progress"),
        ("Completed, Out of Memory", "GPU 0: Completed, Out of Memory"),
        ("N/A, N/A", ""),
        ("[Unknown Error], [Unknown Error]", ""),
    ],
)
def test_only_a_fabric_that_says_so_is_not_ready(kernel: Kernel, row: str, words: str) -> None:
    kernel.programs.put("nvidia-smi", f"echo 'Enabled, Disabled, {row}'")
    found = driver_load.why_no_fabric(seconds=0)
    assert words in found and bool(found) == bool(words)


def test_a_fabric_gets_time(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.programs.put("nvidia-smi", "echo 'Enabled, Disabled, In Progress, N/A'")
    trained = lambda _: kernel.programs.put("nvidia-smi", "echo 'Enabled, Disabled, Completed, Success'")  # noqa: E731
    monkeypatch.setattr(driver_load, "time", types.SimpleNamespace(sleep=trained, monotonic=time.monotonic))
    assert driver_load.why_no_fabric(seconds=60) == ""


def test_programs_get_the_time_that_they_need(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module loads within minutes where the GPUs are many; a build by DKMS takes half an hour at most."""
    asked: set[tuple[str, float]] = set()
    real = driver_load.run

    def run(argv: list[str], timeout: float = 60) -> object:
        asked.add((argv[0], timeout))
        return real(argv, timeout=timeout)

    monkeypatch.setattr(driver_load, "run", run)
    kernel.programs.put("dkms", "exit 1")
    assert driver_load.reload("nvswitch", print) == ""
    assert asked == {("systemctl", 60), ("systemctl", 180), ("rmmod", 120), ("modprobe", 120), ("nvidia-smi", 300)}
    asked.clear()
    kernel.programs.put("rmmod", f"[ $1 = nvidia_uvm ] && exit 1; rmdir {kernel.folder}/$1")
    assert "nvidia_uvm" in driver_load.unload()
    assert asked == {("systemctl", 60), ("systemctl", 180), ("rmmod", 120), ("modprobe", 120)}
    asked.clear()
    monkeypatch.setattr(driver_load.driver_parts, "module_field", lambda *_: "")
    monkeypatch.setattr(driver_load.driver_parts, "has_headers", lambda *_: True)
    assert driver_load.build("k1", None) == "dkms built nothing" and asked == {("dkms", 1800)}
    kernel.programs.put("nvidia-smi", "echo broken; exit 1")
    assert driver_load.reload("nvlink5", print) != "" and driver_load.reload("pcie", print) != ""


def test_modules_of_nvlink_5_are_loaded_or_named(kernel: Kernel) -> None:
    assert driver_load.load_for_nvlink5(check_mode=True) == (["mlx5_ib", "ib_umad"], "")
    assert not kernel.programs.calls("modprobe")
    (kernel.folder / "mlx5_ib").mkdir()
    assert driver_load.load_for_nvlink5(check_mode=False) == (["ib_umad"], "")
    (kernel.folder / "ib_umad").rmdir()
    # A part of the kernel has no folder of its own, and a module that cannot be loaded is the reason.
    kernel.programs.put("modprobe", "exit 0")
    assert driver_load.load_for_nvlink5(check_mode=False) == ([], "")
    kernel.programs.put("modprobe", "echo 'FATAL: Module ib_umad not found' >&2; exit 1")
    assert driver_load.load_for_nvlink5(check_mode=False) == ([], "FATAL: Module ib_umad not found")
    kernel.programs.put("modprobe", "exit 1")
    assert driver_load.load_for_nvlink5(check_mode=False) == ([], "ib_umad")


def test_a_module_in_use_is_named_with_its_users(tmp_path: Path) -> None:
    for name, count, holders in (("nvidia_uvm", "2", ["a", "b"]), ("nvidia", "5", ["nvidia_uvm", "x"])):
        folder = tmp_path / "sys/module" / name
        for holder in holders:
            (folder / "holders" / holder).mkdir(parents=True)
        (folder / "refcnt").write_text(count)
    assert driver_load.in_use(str(tmp_path)) == "the module nvidia is in use (3 times)"
    assert driver_load.in_use(str(tmp_path), without=("nvidia",)) == ""


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("modprobe: ERROR: could not insert: Key was rejected by service", "Secure Boot refuses the module"),
        ("Required key not available", "Secure Boot refuses the module"),
        ("could not insert 'nvidia': No such device", "the kernel sees no GPU"),
        ("anything else", "dmesg"),
    ],
)
def test_what_to_do_about_a_module_that_does_not_load(why: str, words: str) -> None:
    assert words in driver_load.next_step(why)


@pytest.mark.parametrize(
    ("answers", "code", "why", "calls"),
    [
        ([False], 0, "", ["nvidia", "nvidia-uvm", "nvidia-modeset"]),
        ([True, False], 0, "", ["--remove nouveau", "nvidia", "nvidia-uvm", "nvidia-modeset"]),
        ([True, True], 0, "nouveau holds the GPUs: last", ["--remove nouveau"]),
        ([False], 1, "module: first; last", ["nvidia"]),
    ],
)
def test_nouveau_gives_way_to_the_driver(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, answers: list[bool], code: int, why: str, calls: list[str]
) -> None:
    kernel.programs.put("modprobe", f"printf 'first\\nlast\\n' >&2; exit {code}")
    monkeypatch.setattr(driver_load.driver_parts, "nouveau_loaded", lambda: answers.pop(0))
    found = driver_load.load("module")
    assert found.replace("\n", "; ") == why and kernel.programs.calls() == [f"modprobe {each}" for each in calls]
