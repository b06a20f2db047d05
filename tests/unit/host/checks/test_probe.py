"""Reading a host from what its programs print."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import commands, probe
from ansible.module_utils.mixtral_run_host.commands import Result


def _answer(monkeypatch: pytest.MonkeyPatch, result: Result) -> None:
    monkeypatch.setattr(probe, "run", lambda *_, **__: result)


def test_gpus_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    line = "0, NVIDIA H100 80GB HBM3, GPU-1, 81559, 550.54.15, 31, [N/A]\n"
    _answer(monkeypatch, Result(0, line, ""))
    found = probe.gpus()
    assert found["driver"] == "550.54.15" and found["error"] is None
    assert found["gpus"] == [
        {"index": 0, "name": "NVIDIA H100 80GB HBM3", "uuid": "GPU-1", "memory_gib": 79.6,
         "temperature_celsius": 31.0, "ecc_errors": 0.0}
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Result(commands.MISSING, "", ""), "not installed"),
        (Result(commands.TIMED_OUT, "", ""), "hangs"),
        (Result(18, "Failed to initialize NVML: Driver/library version mismatch\n", ""), "mismatch"),
    ],
)
def test_why_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch, result: Result, words: str) -> None:
    _answer(monkeypatch, result)
    found = probe.gpus()
    assert found["gpus"] == [] and found["driver"] is None and words in found["error"]


def test_cdi_spec_in_yaml_and_json(tmp_path: Path) -> None:
    names = ["0", "1", "GPU-abc", "all"]
    text = "kind: nvidia.com/gpu\ndevices:\n" + "".join(f'  - name: "{name}"\n' for name in names)
    (tmp_path / "nvidia.yaml").write_text(text + "mounts:\n  - hostPath: /usr/lib/libcuda.so.550.54.15\n")
    expected = {"path": str(tmp_path / "nvidia.yaml"), "gpus": 2, "driver": "550.54.15"}
    assert probe.cdi([str(tmp_path)]) == expected
    spec = {"kind": "nvidia.com/gpu", "devices": [{"name": name, "containerEdits": {}} for name in names]}
    (tmp_path / "nvidia.yaml").write_text(json.dumps(spec, indent=1) + "libcuda.so.550.54.15")
    assert probe.cdi([str(tmp_path)]) == expected
    assert probe.cdi([str(tmp_path / "none")]) == {"path": None, "gpus": None, "driver": None}


def test_filesystem_of_the_longest_mount(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "overlay / overlay rw 0 0\n/dev/sda1 /data ext4 rw 0 0\n/dev/sdb /data/my\\040disk xfs rw 0 0\n"
    monkeypatch.setattr(probe, "read_text", lambda *_: mounts)
    monkeypatch.setattr(probe.os.path, "realpath", lambda path: path)
    assert probe.filesystem("/data/my disk/x") == "xfs"
    assert probe.filesystem("/data") == "ext4"
    assert probe.filesystem("/database") == "overlay"


def test_mount_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    device, mount, kind = probe.mount_of(str(tmp_path / "not/yet"))
    told = subprocess.run(["findmnt", "-n", "-o", "TARGET,FSTYPE", "-T", tmp_path], capture_output=True, text=True)
    assert [mount, kind] == told.stdout.split()
    assert device == tmp_path.stat().st_dev


@pytest.mark.parametrize(
    ("status", "containerd"),
    [
        ([["driver-type", "io.containerd.snapshotter.v1"]], True),
        ([["Backing Filesystem", "extfs"]], False),
        (None, False),
    ],
)
def test_where_the_engine_stores_images(monkeypatch: pytest.MonkeyPatch, status: object, containerd: bool) -> None:
    info = {"ServerVersion": "29.1.0", "DriverStatus": status, "DockerRootDir": "/data"}
    _answer(monkeypatch, Result(0, json.dumps(info), ""))
    assert probe.engine()["containerd_images"] is containerd


def test_a_hanging_program_comes_back() -> None:
    assert commands.run(["sleep", "30"], timeout=0.2).code == commands.TIMED_OUT
    assert commands.run(["no-such-program"]).code == commands.MISSING


def test_the_whole_state_of_this_machine_is_json() -> None:
    state = json.loads(json.dumps(probe.host(["/tmp"])))
    assert state["memory"]["ram_gib"] > 0 and state["disks"][0]["free_gib"] > 0 and state["kernel"]


def test_what_folders_hold_of_a_filesystem(tmp_path: Path) -> None:
    home, inner = tmp_path / "home", tmp_path / "home/checkpoints"
    inner.mkdir(parents=True)
    with (inner / "weights").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 120 << 20)
    os.link(inner / "weights", home / "again")
    (tmp_path / "link").symlink_to(home)
    folders = [str(each) for each in (home, inner, tmp_path / "link", tmp_path / "none")]
    assert probe.held_gib(str(tmp_path / "not yet/there"), folders) == 0.1
    assert probe.held_gib("/proc", folders) == 0
    assert probe.held_gib(str(tmp_path), []) == 0
