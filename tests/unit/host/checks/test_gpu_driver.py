"""Reading driver, NVSwitches and modes of the GPUs from a tree of files and from what programs print."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.gpu import gpu_driver

from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (dvs@build)\n",
    ],
)
def test_version_of_the_kernel_module(tmp_path: Path, line: str) -> None:
    (tmp_path / "version").write_text(line + "GCC version: 12.3.0\n")
    assert gpu_driver.kernel_driver(str(tmp_path / "version")) == "550.54.15"
    assert gpu_driver.kernel_driver(str(tmp_path / "none")) is None


SWITCH_ON_PCI = {
    "sys/bus/pci/devices/0000:05:00.0/vendor": b"0x10de\n",
    "sys/bus/pci/devices/0000:05:00.0/class": b"0x068000\n",
}
BRIDGE_ON_PCI = {"sys/bus/pci/devices/0000:07:00.0/vendor": b"0x15b3\n"}  # before its driver is loaded
GPU_ON_PCI = {
    "sys/bus/pci/devices/0000:06:00.0/vendor": b"0x10de\n",
    "sys/bus/pci/devices/0000:06:00.0/class": b"0x030200\n",
}


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({}, None),
        (GPU_ON_PCI, None),
        ({"dev/nvidia-nvswitchctl": b"", **GPU_ON_PCI}, None),  # on PCIe hosts too
        ({"dev/nvidia-nvswitch0": b""}, "pci"),
        ({"proc/driver/nvidia-nvswitch/devices/0000:05:00.0": b""}, "pci"),
        ({**SWITCH_ON_PCI, **GPU_ON_PCI}, "pci"),
        ({"sys/class/infiniband/mlx5_0/device/vpd": b"\x82\x0bConnectX-7\x90V3\x06SW_MNG\x78"}, "nvlink5"),
        ({"sys/class/infiniband/mlx5_0/device/vpd": b"\x82\x0bConnectX-7\x78"}, None),
        ({**BRIDGE_ON_PCI, "sys/bus/pci/devices/0000:07:00.0/vpd": b"\x82\x0bConnectX-7\x90V3\x06SW_MNG"}, "nvlink5"),
        ({**BRIDGE_ON_PCI, "sys/bus/pci/devices/0000:07:00.0/vpd": b"\x82\x0bConnectX-7\x78"}, None),
        (BRIDGE_ON_PCI, None),
    ],
)
def test_nvswitches(tmp_path: Path, files: dict[str, bytes], kind: str | None) -> None:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert gpu_driver.nvswitch(str(tmp_path)) == kind


@pytest.mark.parametrize(
    ("kind", "states", "name", "needed"),
    [
        ("pci", ["[N/A]"], "NVIDIA A100-SXM4-80GB", True),
        (None, ["[N/A]"], "NVIDIA A40", False),
        (None, [], "NVIDIA H100 PCIe", False),
        (None, ["In Progress"], "NVIDIA B200", True),  # not root: the VPD cannot be read
        (None, ["Completed"], "NVIDIA GB200", False),  # the switches are in the rack
        (None, ["N/A"], "NVIDIA GH200 480GB", False),
    ],
)
def test_who_needs_the_fabric_manager(kind: str | None, states: list, name: str, needed: bool) -> None:
    assert gpu_driver.needs_fabric_manager(kind, states, [name]) is needed


def test_an_nvlink5_host_tells_what_its_fabric_manager_lacks(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    programs.put("dpkg-query", "echo not-installed")
    for name in ("sys/class/infiniband/mlx5_0/device", "sys/module/mlx5_ib"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "sys/class/infiniband/mlx5_0/device/vpd").write_bytes(b"SW_MNG")
    found = gpu_driver.fabric_manager({"fabric.state": ["In Progress"]}, ["NVIDIA B200"], str(tmp_path))
    assert found["nvswitch"] and found["missing"] == ["kernel module ib_umad", "package nvlsm"]


def test_a_field_that_an_old_driver_refuses_is_left_out(programs: Programs) -> None:  # noqa: F811
    programs.put(
        "nvidia-smi",
        'case "$1" in *fabric.state*) echo \'Field "fabric.state" is not a valid field to query.\'; exit 2 ;;',
        "*fabric.status*) echo 'Field \"fabric.status\" is not a valid field to query.'; exit 2 ;; esac",
        "printf 'Enabled, Disabled\\nDisabled, Enabled\\n'",
    )
    assert gpu_driver.modes() == {
        "persistence_mode": ["Enabled", "Disabled"],
        "mig.mode.current": ["Disabled", "Enabled"],
    }
    programs.put("nvidia-smi", "exit 9")
    assert gpu_driver.modes() == {}


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        ([], None),
        (["vmlinuz"], None),
        (["vmlinuz-6.8.0-9-generic", "vmlinuz-6.8.0-45-generic"], "6.8.0-45-generic"),
        (["vmlinuz-6.1.0-37-amd64", "vmlinuz-6.12.4-amd64", "vmlinuz-0-rescue-abc"], "6.12.4-amd64"),
    ],
)
def test_newest_kernel(names: list[str], newest: str | None) -> None:
    assert gpu_driver.newest_kernel(names) == newest


def test_modules_of_the_running_and_of_the_newest_kernel(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "boot").mkdir()
    for release in ("6.8.0-44-generic", "6.8.0-45-generic"):
        (tmp_path / f"boot/vmlinuz-{release}").touch()
    programs.put("modinfo", 'case "$2" in *-44-*) echo 580.173.02 ;; *) echo "not found" >&2; exit 1 ;; esac')
    found = gpu_driver.modules_on_disk("6.8.0-44-generic", str(tmp_path))
    assert found == {"on_disk": "580.173.02", "newest_kernel": "6.8.0-45-generic", "in_newest_kernel": ""}
