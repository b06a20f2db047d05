"""Readings of the parts of a host's NVIDIA driver. None of them changes anything."""

from __future__ import annotations

import glob
import os
import re

from ..commands import MISSING, run
from ..files import read_text
from . import gpu_driver
from .driver_states import Parts

NVIDIA_VENDOR = "0x10de"
GPU_CLASSES = ("0x0300", "0x0302")
DRIVER_PACKAGE = (
    r"(lib)?nvidia-(?!container)|libnvsdm|libxnvctrl|cuda-drivers|firmware-nvidia|xserver-xorg-video-nvidia"
)
"""Beginning of the names of a driver's packages. The container toolkit has versions of its own."""
# Daemons that hold the device files and that no job needs: they are stopped with the modules.
DAEMONS = ("nvidia-persiste", "nv-fabricmanage", "nv-hostengine", "dcgm-exporter", "nvlsm", "nvidia-smi")
UBUNTU_OR_DEBIAN = re.compile(r"-0ubuntu0\.|[~+]deb\d+u")
"""In the versions of Ubuntu's and Debian's own packages, which unattended upgrades take by default."""


def parts(needs_fabric_manager, target=None, root="/"):
    """Return the Parts of this host's driver. needs_fabric_manager: True for a board with switches."""
    running = os.uname().release
    newest = gpu_driver.newest_kernel(
        [os.path.basename(path) for path in glob.glob(os.path.join(root, "boot/vmlinuz-*"))]
    )
    secure = secure_boot(root)
    return Parts(
        loaded=gpu_driver.kernel_driver(),
        on_disk=module_field(running, "version"),
        library=library_version(root),
        running_kernel=running,
        newest_kernel=newest,
        in_newest_kernel=module_field(newest, "version") if newest and newest != running else None,
        headers=has_headers(newest or running, root),
        fabric_manager=fabric_manager_version() if needs_fabric_manager else None,
        needs_fabric_manager=needs_fabric_manager,
        nouveau=nouveau_loaded(root),
        secure_boot=secure,
        signer=module_field(newest or running, "signer") if secure else None,
        target=target or None,
    )


def for_next_boot(root="/"):
    """Return what the next boot and the next night do to an installed driver, as a part of the host's state.

    library: version of the user-space library. headers: the kernel that boots next has its headers. secure_boot, signer:
    whether modules must be signed, and who signed the one that boots next. open_to_upgrades: packages of the driver that
    an unattended upgrade may change. All are None on a host without the library.
    """
    found = dict.fromkeys(("library", "headers", "secure_boot", "signer", "open_to_upgrades"))
    library = library_version(root)
    if library is None:
        return found
    release = gpu_driver.newest_kernel(
        [os.path.basename(path) for path in glob.glob(os.path.join(root, "boot/vmlinuz-*"))]
    )
    release, secure = release or os.uname().release, secure_boot(root)
    signer = module_field(release, "signer") if secure else None
    found.update(library=library, headers=has_headers(release, root), secure_boot=secure, signer=signer)
    found["open_to_upgrades"] = open_to_upgrades()
    return found


def fabric_manager_version():
    """Return the version of the installed fabric manager, or an empty text if there is none."""
    number = re.search(r"(\d+\.\d+(?:\.\d+)?)", run(["nv-fabricmanager", "--version"], timeout=15).out)
    return number.group(1) if number else ""


def pci_gpus(root="/"):
    """Return the PCI device id of each NVIDIA GPU as a number. It needs no driver."""
    found = []
    for vendor in sorted(glob.glob(os.path.join(root, "sys/bus/pci/devices/*/vendor"))):
        folder = os.path.dirname(vendor)
        kind = read_text(os.path.join(folder, "class"), "")
        if read_text(vendor, "").strip() == NVIDIA_VENDOR and kind.startswith(GPU_CLASSES):
            found.append(int(read_text(os.path.join(folder, "device"), "0x0").strip(), 16))
    return found


def library_version(root="/"):
    """Return the version of the user-space library that programs load, or None if there is none."""
    versions = []
    for path in glob.glob(os.path.join(root, "usr/lib/*/libnvidia-ml.so*")) + glob.glob(
        os.path.join(root, "usr/lib64/libnvidia-ml.so*")
    ):
        match = re.search(r"libnvidia-ml\.so\.(\d+\.\d+(?:\.\d+)?)$", os.path.realpath(path))
        if match and path.endswith(".so.1"):
            return match.group(1)
        versions += [match.group(1)] if match else []
    return max(versions, key=lambda each: [int(part) for part in each.split(".")], default=None)


def secure_boot(root="/"):
    """Return True if the firmware refuses modules that it does not trust. The variable is four bytes of flags and a value."""
    for path in glob.glob(os.path.join(root, "sys/firmware/efi/efivars/SecureBoot-*")):
        try:
            with open(path, "rb") as file:
                return file.read(5)[4:] == b"\x01"
        except OSError:
            continue
    return False


def module_field(release, field):
    """Return a field of a kernel's NVIDIA module: "" if there is no such module or field, None without modinfo."""
    answer = run(["modinfo", "-k", release, "-F", field, "nvidia"], timeout=15)
    return None if answer.code == MISSING else answer.out.strip() if answer.code == 0 else ""


def has_headers(release, root="/"):
    """Return True if modules can be built for a kernel."""
    return os.path.isdir(os.path.join(root, "lib/modules", release, "build"))


def nouveau_loaded(root="/"):
    """Return True if the free driver nouveau holds the GPUs."""
    return os.path.isdir(os.path.join(root, "sys/module/nouveau"))


def packages():
    """Return {name: (version, held)} of all installed packages."""
    fields = "${Package} ${Version} ${db:Status-Status} ${db:Status-Want}\\n"
    rows = [line.split(" ") for line in run(["dpkg-query", "--show", "--showformat", fields]).out.splitlines()]
    return {row[0]: (row[1], row[3] == "hold") for row in rows if len(row) == 4 and row[2] == "installed"}


def holders(proc="/proc"):
    """Return the programs that have the GPUs' device files open, as "name (pid)", without DAEMONS.

    It answers even if library and module differ, when nvidia-smi does not. Only root sees the programs of all users.
    """
    found = set()
    for link in glob.glob(os.path.join(proc, "[0-9]*/fd/*")):
        try:
            if not os.readlink(link).startswith("/dev/nvidia"):
                continue
            pid = link.split("/")[-3]
            name = read_text(os.path.join(proc, pid, "comm"), "").strip()
        except OSError:  # the program has ended in the meantime
            continue
        if not name.startswith(DAEMONS):
            found.add("{} ({})".format(name, pid))
    return sorted(found)


def why_held():
    """Return which programs hold the GPUs, or an empty text."""
    found = holders()
    return "programs hold the GPUs: {}".format(", ".join(found[:5])) if found else ""


def open_to_upgrades():
    """Return the driver's packages that an unattended upgrade may change, in any night."""
    dump = run(["apt-config", "dump"], timeout=15)
    if dump.code:
        return []
    return exposed(dump.out, packages())


def exposed(dump, installed):
    """Return the names of the driver's packages that unattended upgrades may change. A pure function.

    Args:
        dump: the output of `apt-config dump`.
        installed: the result of packages().
    """
    if not re.search(r'^APT::Periodic::Unattended-Upgrade "[1-9]', dump, re.MULTILINE):
        return []
    patterns = re.findall(r'^Unattended-Upgrade::Package-Blacklist:: "(.*)";$', dump, re.MULTILINE)
    origins = re.findall(r'^Unattended-Upgrade::(?:Allowed-Origins|Origins-Pattern):: "(.*)";$', dump, re.MULTILINE)
    foreign = any(re.search("nvidia|cuda", origin, re.IGNORECASE) for origin in origins)
    return sorted(
        name
        for name, (version, held) in installed.items()
        if re.match(DRIVER_PACKAGE, name)
        and not held
        and (foreign or UBUNTU_OR_DEBIAN.search(version))
        and not any(_matches(pattern, name) for pattern in patterns)
    )


def _matches(pattern, name):
    try:
        return re.match(pattern, name) is not None
    except re.error:  # unattended-upgrades does not read it either
        return False
