"""Reading a host from what its programs print."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

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


def _files(monkeypatch: pytest.MonkeyPatch, **texts: str) -> None:
    """Let the host have these files only, by the last part of their path, without its ending."""
    monkeypatch.setattr(probe, "read_text", lambda path, default=None: texts.get(Path(path).stem, default))


def test_what_files_say_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,585,445,929 and 8,388,604 kB are 1,512.0 and 8.0 GiB."""
    release = 'PRETTY_NAME="Ubuntu 22.04.4 LTS"\nID=ubuntu\nVERSION_ID="22.04"\nVERSION_CODENAME=jammy\n'
    swaps = "Filename Type Size Used Priority\n/swapfile file 33554428 0 -2\n/dev/sda2 partition 1048576 0 -3\n"
    texts = {
        "os-release": release,
        "meminfo": "MemTotal:       1585445929 kB\nMemFree: 7 kB\nSwapTotal:        8388604 kB\n",
        "swaps": swaps,
        "ssh_host_ed25519_key": "ssh-ed25519 AAAAC3 root@host\n",
        "machine-id": "0123abcd\n",
    }
    _files(monkeypatch, **texts)
    names = {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04.4 LTS"}
    assert probe.os_release() == names
    assert probe.memory() == {"ram_gib": 1512.0, "swap_gib": 8.0}
    assert probe.swap_files() == [{"path": "/swapfile", "size_gib": 32.0}, {"path": "/dev/sda2", "size_gib": 1.0}]
    assert probe.identity() == {"machine_id": "0123abcd", "ssh_host_key": "AAAAC3"}
    _files(monkeypatch)
    assert probe.os_release() == dict.fromkeys(names, "")
    assert probe.memory() == {"ram_gib": 0.0, "swap_gib": 0.0} and probe.swap_files() == []
    assert probe.identity() == {"machine_id": "", "ssh_host_key": ""}
    _files(monkeypatch, ssh_host_ed25519_key="damaged")
    assert probe.identity()["ssh_host_key"] == ""


def test_architecture_in_the_words_of_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, expected in (("x86_64", "amd64"), ("aarch64", "arm64"), ("riscv64", "riscv64")):
        monkeypatch.setattr(probe.os, "uname", lambda machine=machine: SimpleNamespace(machine=machine))
        assert probe.architecture() == expected


def test_space_of_the_nearest_folder_that_exists(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of 4 KiB: 655,360 free ones for users are 2.5 GiB, 2,621,440 in all are 10 GiB."""
    asked: list[str] = []
    figures = SimpleNamespace(f_bavail=655360, f_bfree=700000, f_frsize=4096, f_bsize=8192, f_blocks=2621440)
    monkeypatch.setattr(probe.os, "statvfs", lambda path: asked.append(path) or figures)
    monkeypatch.setattr(probe, "filesystem", lambda path: f"of {path}")
    path = str(tmp_path / "not/yet")
    expected = {"path": path, "free_gib": 2.5, "total_gib": 10.0, "filesystem": f"of {tmp_path}"}
    assert probe.disk(path) == expected and asked == [str(tmp_path)]


def test_records_by_name_and_damaged_ones(tmp_path: Path) -> None:
    (tmp_path / "docker.json").write_text('{"a": 1}')
    (tmp_path / "swap.json").write_text("{")
    (tmp_path / "other.txt").write_text("{}")
    assert probe.records(str(tmp_path)) == {"docker": {"a": 1}, "swap": None}


def test_records_and_folders_that_only_root_can_read_hide_nothing_else() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "swap.json").write_text('{"a": 1}')
        (folder / "acceptance.json").write_text("{}")
        (folder / "acceptance.json").chmod(0)
        (folder / "checkpoints").mkdir(mode=0o000)
        paths = [str(folder / each) for each in ("swap.json", "acceptance.json", "checkpoints", "missing")]
        paths.append(str(folder / "checkpoints/run"))
        before = os.geteuid()
        try:
            os.seteuid(65534 if before == 0 else before)
            found, unreadable = probe.records(name), probe.unreadable(paths)
        finally:
            os.seteuid(before)
        (folder / "checkpoints").chmod(0o700)
    assert found == {"acceptance": None, "swap": {"a": 1}}
    assert unreadable == [paths[1], paths[2], paths[4]]


def test_the_engine_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = {"version": None, "runtimes": [], "cdi_devices": [], "containers_running": 0, "root": None,
               "containerd_images": False}  # fmt: skip
    info = {
        "ServerVersion": "29.1.0", "Runtimes": {"runc": {}, "nvidia": {}}, "ContainersRunning": 3,
        "DockerRootDir": "/data", "DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}, {"Source": "x"}],
    }  # fmt: skip
    _answer(monkeypatch, Result(0, json.dumps(info), ""))
    assert probe.engine() == {
        "version": "29.1.0", "runtimes": ["nvidia", "runc"], "cdi_devices": ["nvidia.com/gpu=0"],
        "containers_running": 3, "root": "/data", "error": None, "containerd_images": False,
    }  # fmt: skip
    for result, error in (
        (Result(commands.MISSING, "", "no such file"), "docker is not installed"),
        (Result(0, '{"ServerErrors": ["one", "two"]}', "warning"), "one; two"),
        (Result(1, json.dumps(info), " permission denied\n"), "permission denied"),
        (Result(0, "no JSON", "odd"), "odd"),
    ):
        _answer(monkeypatch, result)
        assert probe.engine() == {**nothing, "error": error}


def test_a_driver_that_is_there_and_does_not_answer_is_sick(monkeypatch: pytest.MonkeyPatch) -> None:
    for code, sick in ((0, False), (commands.MISSING, False), (commands.TIMED_OUT, True), (9, True), (-6, True)):
        _answer(monkeypatch, Result(code, "", ""))
        assert probe.gpus()["sick"] is sick
    # A line that is no GPU is left out, and then there is no driver either.
    _answer(monkeypatch, Result(0, "WARNING: infoROM is corrupted, see dmesg\n\n", ""))
    assert (probe.gpus()["gpus"], probe.gpus()["driver"]) == ([], None)


def test_programs_are_asked_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, float] = {}
    outputs = {
        "timedatectl": "no\n",
        "nvidia-ctk": "NVIDIA Container Toolkit CLI version 1.17.8\ncommit: 1.2.3",
        "docker images": "abc kit:1 of today\ndef kit:2\n",
        "du": "12 /a\n3221225472\ttotal\n",
    }

    def run(argv: list[str], timeout: float) -> Result:
        name = " ".join(argv[:2]) if argv[0] == "docker" else argv[0]
        asked[name] = timeout
        return Result(0, outputs.get(name, ""), "")

    monkeypatch.setattr(probe, "run", run)
    assert probe.clock_synchronized() is False and probe.toolkit_version() == "1.17.8"
    assert probe.images() == [{"id": "abc", "tag": "kit:1 of today"}, {"id": "def", "tag": "kit:2"}]
    assert probe.held_gib("/", ["/"]) == 3.0
    outputs.clear()
    assert probe.clock_synchronized() is None and probe.toolkit_version() is None and probe.images() == []
    assert probe.held_gib("/", ["/"]) == 0
    probe.gpus()
    probe.engine()
    assert asked == {
        "timedatectl": 15, "nvidia-ctk": 15, "docker images": 30, "docker info": 30, "du": 120, "nvidia-smi": 30,
    }  # fmt: skip
