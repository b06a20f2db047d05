"""States of an NVIDIA driver: what works now, what the next boot makes of it, and the way out. Pure functions.

The parts of a driver are upgraded at different times: the loaded module stays until it is unloaded, the files on disk
change with a package, a new kernel needs a module of its own, and the fabric manager is a package of its own. All parts
must have one version.
"""

from __future__ import annotations

from collections import namedtuple

Parts = namedtuple(
    "Parts",
    "loaded on_disk library running_kernel newest_kernel in_newest_kernel headers fabric_manager needs_fabric_manager "
    "nouveau secure_boot signer target",
    defaults=(None,) * 13,
)
"""Versions of the parts of a driver. None means unknown, an empty string means that the part is not there.

loaded: module in the kernel. on_disk: module that modprobe would load into the running kernel. library: user-space
library. in_newest_kernel: module of the kernel that boots next. headers: True if this kernel has its headers. nouveau:
True if nouveau is loaded. secure_boot: True if the firmware refuses unsigned modules. signer: who signed the module of the
kernel that boots next. target: wanted version, or its beginning such as 580.
"""

Finding = namedtuple("Finding", "name when expected found step")
"""when: NOW (it does not work), NEXT_BOOT (it works until the next boot), PENDING (a boot changes the version, and nothing
breaks) or TARGET (another version than the wanted one)."""

NOW, NEXT_BOOT, PENDING, TARGET = "now", "next boot", "pending", "target"
REBOOT = "reboot when the host is idle"
BUILD = (
    "before any reboot: install the kernel's headers and run `sudo dkms autoinstall -k {0}`, or install Ubuntu's "
    "linux-modules-nvidia package for it; `modinfo -k {0} nvidia` then shows the module"
)


def findings(parts):
    """Return what is wrong with a driver as a list of Finding, or an empty list if all parts agree."""
    if not (parts.loaded or parts.on_disk or parts.library):
        return [Finding("absent", NOW, "an NVIDIA driver", "none", "install it")]
    found = _now(parts) + _next_boot(parts) + _fabric_manager(parts)
    have = parts.on_disk or parts.library or parts.loaded
    if parts.target and not is_version(have, parts.target):
        found.append(Finding("other_version", TARGET, "driver {}".format(parts.target), have, "install the wanted one"))
    return found


def works(found):
    """Return True if the GPUs can be used until the next boot."""
    return all(each.when != NOW for each in found)


def may_reboot(found):
    """Return True if the next boot breaks nothing that works now."""
    return all(each.when != NEXT_BOOT for each in found)


def needs_reboot(found):
    """Return True if other modules must be in the kernel: by a reboot, or by a reload of the modules."""
    return any(each.name in ("split", "pending", "nouveau") for each in found)


def is_version(version, wanted):
    """Return True if `version` is `wanted` or begins with it: 580.173.02 is of 580, and not of 58."""
    return bool(version) and (version == wanted or version.startswith(wanted + "."))


def coming(parts):
    """Return the version of the module that the next boot loads, "" if there is none, None if it is unknown."""
    return parts.on_disk if parts.in_newest_kernel is None else parts.in_newest_kernel


def _now(parts):
    if parts.loaded:
        if parts.library and parts.library != parts.loaded:
            found = "kernel module {}, library {}".format(parts.loaded, parts.library)
            wanted = "kernel module and user-space library of one version"
            return [Finding("split", NOW, wanted, found, REBOOT)]
        return []
    if parts.on_disk == "":
        step = BUILD.format(parts.running_kernel)
        return [Finding("no_module", NOW, "an NVIDIA module for kernel {}".format(parts.running_kernel), "none", step)]
    if parts.nouveau:
        step = "blacklist nouveau, run `sudo update-initramfs -u`, and reboot"
        return [Finding("nouveau", NOW, "NVIDIA's module in the kernel", "nouveau", step)]
    return [Finding("not_loaded", NOW, "NVIDIA's module in the kernel", "it is not loaded", "`sudo modprobe nvidia`")]


def _next_boot(parts):
    after, kernel = coming(parts), parts.newest_kernel or parts.running_kernel
    if after is None:
        return []
    if after == "":
        if kernel == parts.running_kernel and not parts.loaded:
            return []  # no_module says so
        wanted = "an NVIDIA module for the kernel that boots next, {}".format(kernel)
        lack = " and no headers to build one" if parts.headers is False else ""
        found = "kernel {} has no NVIDIA module{}: after a reboot the host has no GPUs".format(kernel, lack)
        return [Finding("next_boot_without_module", NEXT_BOOT, wanted, found, BUILD.format(kernel))]
    if parts.library and after != parts.library:
        found = "module {} for kernel {}, library {}".format(after, kernel, parts.library)
        wanted = "the module that boots next and the library of one version"
        return [Finding("next_boot_split", NEXT_BOOT, wanted, found, BUILD.format(kernel))]
    if parts.secure_boot and parts.signer == "":
        wanted = "a signed module for the kernel that boots next, because Secure Boot is on"
        found = "the module of kernel {} is not signed: the kernel refuses it".format(kernel)
        step = "install Ubuntu's signed linux-modules-nvidia package, or enroll the key of DKMS at the console"
        return [Finding("next_boot_unsigned", NEXT_BOOT, wanted, found, step)]
    if parts.loaded and after != parts.loaded:
        found = "module {} loaded, {} on disk: the next reboot changes the driver".format(parts.loaded, after)
        return [Finding("pending", PENDING, "the loaded driver and the one on disk of one version", found, REBOOT)]
    if parts.loaded and kernel != parts.running_kernel:
        found = "kernel {} runs, {} boots next".format(parts.running_kernel, kernel)
        return [Finding("kernel_pending", PENDING, "the newest kernel", found, REBOOT)]
    return []


def _fabric_manager(parts):
    wanted = coming(parts) or parts.on_disk or parts.library or parts.loaded
    if not parts.needs_fabric_manager or parts.fabric_manager is None or parts.fabric_manager == wanted:
        return []
    expected = "fabric manager {}, as the driver".format(wanted)
    if parts.fabric_manager == "":
        return [Finding("fabric_manager_missing", NOW, expected, "none", "install it")]
    found = "fabric manager {}".format(parts.fabric_manager)
    # A fabric manager of the loaded driver's version works until the boot that changes the driver.
    when = NEXT_BOOT if parts.fabric_manager == parts.loaded else NOW
    return [Finding("fabric_manager_split", when, expected, found, "install fabric manager {}".format(wanted))]
