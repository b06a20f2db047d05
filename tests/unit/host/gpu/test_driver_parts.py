"""The parts of a driver, read from a tree of files and from what programs print."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.gpu import driver_parts

from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture


def put(root: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_gpus_are_found_without_a_driver(tmp_path: Path) -> None:
    for slot, vendor, kind, device in (
        ("06", "0x10de", "0x030200", "0x2330"),
        ("07", "0x10de", "0x030000", "0x1db5"),
        ("05", "0x10de", "0x068000", "0x22a3"),  # an NVSwitch
        ("08", "0x10de", "0x040300", "0x10f7"),  # a GPU's audio device
        ("09", "0x1a03", "0x030000", "0x2000"),  # the board's own display
    ):
        folder = f"sys/bus/pci/devices/0000:{slot}:00.0"
        put(tmp_path, {f"{folder}/vendor": f"{vendor}\n", f"{folder}/class": kind, f"{folder}/device": f"{device}\n"})
    assert driver_parts.pci_gpus(str(tmp_path)) == [0x2330, 0x1DB5]


def test_the_library_that_programs_load(tmp_path: Path) -> None:
    assert driver_parts.library_version(str(tmp_path)) is None
    folder = tmp_path / "usr/lib/x86_64-linux-gnu"
    put(tmp_path, {f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{each}": "" for each in ("580.95.05", "580.173.02")})
    assert driver_parts.library_version(str(tmp_path)) == "580.173.02"
    (folder / "libnvidia-ml.so.1").symlink_to("libnvidia-ml.so.580.95.05")
    assert driver_parts.library_version(str(tmp_path)) == "580.95.05"


@pytest.mark.parametrize(("content", "on"), [(b"\x06\0\0\0\x01", True), (b"\x06\0\0\0\0", False), (b"", False)])
def test_secure_boot(tmp_path: Path, content: bytes, on: bool) -> None:
    assert driver_parts.secure_boot(str(tmp_path)) is False
    put(tmp_path, {"sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c": content})
    assert driver_parts.secure_boot(str(tmp_path)) is on


def test_programs_that_hold_the_gpus(tmp_path: Path) -> None:
    for pid, name, target in (
        ("10", "python3", "/dev/nvidia0"),
        ("11", "nvidia-persiste", "/dev/nvidiactl"),  # the kernel cuts names to 15 characters
        ("12", "sshd", "/dev/null"),
    ):
        folder = tmp_path / pid / "fd"
        folder.mkdir(parents=True)
        (tmp_path / pid / "comm").write_text(name + "\n")
        (folder / "3").symlink_to(target)
    assert driver_parts.holders(str(tmp_path)) == ["python3 (10)"]


DUMP = """
APT::Periodic::Unattended-Upgrade "1";
Unattended-Upgrade::Allowed-Origins:: "${distro_id}:${distro_codename}-security";
Unattended-Upgrade::Package-Blacklist:: "libnvidia-";
Unattended-Upgrade::Package-Blacklist:: "(broken";
"""
UBUNTUS, NVIDIAS = "580.173.02-0ubuntu0.24.04.1", "580.173.02-1ubuntu1"
INSTALLED = {
    "nvidia-utils-580-server": (UBUNTUS, False),
    "nvidia-fabricmanager-580": (UBUNTUS, True),
    "libnvidia-compute-580-server": (UBUNTUS, False),
    "nvidia-open": (NVIDIAS, False),
    "nvidia-container-toolkit": ("1.18.1-1", False),
    "libnvidia-container1": ("1.18.1-1", False),
    "bash": ("5.2-0ubuntu0.1", False),
}


@pytest.mark.parametrize(
    ("dump", "names"),
    [
        (DUMP, ["nvidia-utils-580-server"]),
        (DUMP.replace('Upgrade "1"', 'Upgrade "0"'), []),
        ("", []),
        (DUMP.replace("libnvidia-", "nvidia-"), ["libnvidia-compute-580-server"]),
        (DUMP.replace("distro_id}:", "distro_id}:NVIDIA"), ["nvidia-open", "nvidia-utils-580-server"]),
    ],
)
def test_packages_that_a_night_may_change(dump: str, names: list[str]) -> None:
    assert driver_parts.exposed(dump, INSTALLED) == names


def test_the_parts_of_a_host_whose_next_kernel_has_no_module(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    put(tmp_path, {"boot/vmlinuz-99.0.0-1-amd64": ""})
    programs.put("modinfo", 'case "$2" in 99.*) exit 1 ;; *) echo 580.95.05 ;; esac')
    programs.put("nv-fabricmanager", "echo 'Fabric Manager version is : 580.95.05'")
    found = driver_parts.parts(True, "580.95.05", str(tmp_path))
    assert (found.on_disk, found.newest_kernel, found.in_newest_kernel) == ("580.95.05", "99.0.0-1-amd64", "")
    assert (found.fabric_manager, found.headers, found.nouveau, found.signer) == ("580.95.05", False, False, None)
