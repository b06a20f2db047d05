"""What a host needs as its NVIDIA driver: source, kernel modules and packages. Pure functions over what was read."""

from __future__ import annotations

import re
from collections import namedtuple

from .driver_states import is_version

Host = namedtuple(
    "Host", "os_id os_version kernel packages pci_ids board secure_boot loaded library error managed", defaults=(False,)
)
"""What was read from a host. packages: {name: version} of those installed. pci_ids: device ids of NVIDIA's GPUs as
numbers. board: "pcie", "nvswitch" or "nvlink5". loaded, library: versions of the driver that is there, or None. error:
why nvidia-smi does not answer, or None. managed: True if the kit installed the driver."""

Plan = namedtuple("Plan", "action why source modules packages versioned pinning leave_holds")
"""action: "none", "adopt" or "install". why: a sentence. source: "nvidia" or "ubuntu". modules: "open" or "proprietary".
packages: all to install, without the pinning package. versioned: those of the driver's version. pinning: beginning of the
pinning package's name, or "". leave_holds: packages that are not held, because they are the kernel's or the system's."""

DEFAULT_BRANCH = "580"
"""Long-term branch until June 2028. It runs images of CUDA 12 and of CUDA 13."""
FIRST_OPEN_GPU = 0x1E00
"""The PCI device ids of Turing, the oldest GPUs that open kernel modules support, begin here. B200 has no others."""
LAST_PROPRIETARY_BRANCH = 610
NO_BRANCH_IN_NAMES = 590
NVLINK5_KERNEL = (5, 17)
UBUNTU_WITHOUT_PACKAGES = (20, 4)


class Refused(Exception):
    """Nothing can be installed as wanted. `expected`, `found` and `step` are parts of the message."""

    def __init__(self, expected, found, step):
        super().__init__(found)
        self.expected, self.found, self.step = expected, found, step


def plan(host, wishes):
    """Return the Plan for a host.

    Args:
        host: a Host.
        wishes: dict of branch, version, source ("auto", "nvidia", "ubuntu"), modules ("auto", "open", "proprietary"),
            packages (names that replace those of the driver), gpus_wanted (False if the host is to be used without its
            GPUs), own_keys (True if the firmware trusts the key of DKMS).

    Raises:
        Refused: the host cannot get this driver.
    """
    _refuse_forms(wishes["branch"], wishes["version"])
    wanted = wishes["version"] or wishes["branch"]
    if not host.pci_ids and not host.board and not host.managed:
        return _nothing("none", "the host has no NVIDIA GPU on PCI")
    if not host.managed and not wanted and not wishes["gpus_wanted"]:
        return _nothing("none", "no GPUs are asked for (preflight_num_gpus: 0)")
    if not host.managed and host.loaded and not host.error and (not wanted or is_version(host.loaded, wanted)):
        why = "driver {} runs: it is adopted as it is, with its packages and holds".format(host.loaded)
        return _nothing("adopt", why)
    _refuse_foreign(host, wanted)
    source = _source(host, wishes)
    branch = branch_of(wanted, host)
    modules = _modules(host, wishes, branch)
    if source == "nvidia" and host.secure_boot and not wishes["own_keys"]:
        raise Refused(
            "a firmware without Secure Boot, or modules that it trusts",
            "Secure Boot is on, and NVIDIA's repository builds unsigned modules on the host",
            "switch Secure Boot off, or on Ubuntu set nvidia_driver_source: ubuntu, or enroll the key of DKMS at the "
            "console (`mokutil --import`) and set nvidia_driver_dkms_key_enrolled: true",
        )
    names = _of_ubuntu if source == "ubuntu" else _of_nvidia
    versioned, others = names(host, branch, modules)
    if wishes["packages"]:
        versioned = list(wishes["packages"]) + [name for name in versioned if "fabricmanager" in name]
    kernel = headers(host) if source == "nvidia" else []
    pinning = "nvidia-driver-pinning-" if source == "nvidia" and branch >= 580 else ""
    why = "driver {} with {} kernel modules from {}".format(wanted or branch, modules, _NAMES[source])
    leave = kernel + [name for name in others if not re.match("nvl|libnv", name)]
    return Plan("install", why, source, modules, versioned + others + kernel, versioned, pinning, leave)


_NAMES = {"nvidia": "NVIDIA's repository", "ubuntu": "Ubuntu's archive"}


def branch_of(wanted, host):
    """Return the branch as a number: that of the wanted version, of the kit's installed driver, or the default."""
    present = host.library if host.managed and host.library else DEFAULT_BRANCH
    return int((wanted or present).split(".")[0])


def _refuse_forms(branch, version):
    """Refuse a branch or a version that no driver has, and a version of another branch."""
    example = "a branch such as 580 and a version such as 580.173.02, or empty texts"
    if branch and not re.match(r"\d+$", branch):
        raise Refused(
            example, "nvidia_driver_branch: {!r}".format(branch), "set the number alone, or nvidia_driver_version"
        )
    if version and not re.match(r"\d+(\.\d+){1,2}$", version):
        step = "set the driver's version without a revision, as `nvidia-smi` shows it, or nvidia_driver_branch"
        raise Refused(example, "nvidia_driver_version: {!r}".format(version), step)
    if branch and version and not is_version(version, branch):
        found = "nvidia_driver_version: {}, nvidia_driver_branch: {}".format(version, branch)
        raise Refused("a version of the branch", found, "set one of them, or both alike")


def kept_board(board, packages, managed):
    """Return the kind of a board whose switches PCI shows, or those for which the kit installed a fabric manager.

    Switches can be missing from PCI for a while: a fault, or a virtual machine in the making. The fabric manager of a
    running host must not go because of that.

    Args:
        board: what PCI shows: "", "pcie", "nvswitch" or "nvlink5".
        packages: names of the installed packages.
        managed: True if the kit installed the driver.
    """
    if (
        not managed
        or board not in ("", "pcie")
        or not any(re.match(r"nvidia-fabricmanager(-\d+)?$", each) for each in packages)
    ):
        return board
    return "nvlink5" if "nvlsm" in packages else "nvswitch"


def distribution(os_id, os_version):
    """Return the name of NVIDIA's repository for a system: ubuntu 22.04 → ubuntu2204, debian 12 → debian12."""
    return os_id + os_version.replace(".", "")


def headers(host):
    """Return the packages of kernel headers, those of the next kernels too, for which DKMS builds the modules.

    A metapackage of the kernel, such as linux-image-generic, has one of the headers of the same ending.
    """
    metas = [re.match(r"linux-image-((?:[a-z]+-)*[a-z][a-z0-9]*(?:-hwe-[\d.]+\w*)?)$", name) for name in host.packages]
    found = ["linux-headers-" + match.group(1) for match in metas if match and "unsigned" not in match.group(1)]
    if "linux-image-" + host.kernel in host.packages or "linux-image-unsigned-" + host.kernel in host.packages:
        found.append("linux-headers-" + host.kernel)
    return sorted(set(found))


def _nothing(action, why):
    return Plan(action, why, "", "", [], [], "", [])


def _refuse_foreign(host, wanted):
    """Refuse to replace a driver of somebody else that does not run, unless another version is wanted.

    Refuse a driver that no package owns in any case: packages beside it would split library and module.
    """
    if host.managed:
        return
    right = host.loaded and host.loaded == host.library and (not wanted or is_version(host.loaded, wanted))
    if right and host.error:
        raise Refused(
            "a driver that runs, which would be adopted, or one of another version",
            "driver {} is complete and does not answer: {}".format(host.loaded, host.error),
            "repair the GPUs, not the driver: `sudo dmesg | grep -i -e nvrm -e xid`; a reboot of the idle host may do",
        )
    owned = any(_is_driver(name) for name in host.packages)
    if owned and not wanted:
        raise Refused(
            "a driver that runs, which would be adopted, or none",
            "a driver that somebody else installed: {}".format(host.error or "it is not loaded"),
            "repair it (`mixtral-run status` says what differs; a reboot may do), or set nvidia_driver_branch: the role "
            "then replaces it",
        )
    if host.library and not owned:
        raise Refused(
            "a driver from packages, or none",
            "driver {} that no package owns (NVIDIA's .run installer)".format(host.library),
            "remove it with `sudo nvidia-uninstall`, then run again; or leave nvidia_driver_branch and _version empty, "
            "which adopts it when it works",
        )


def _is_driver(name):
    return re.match(r"(lib)?nvidia-(?!container)|cuda-drivers", name) is not None


def _source(host, wishes):
    source, release = wishes["source"], tuple(int(part) for part in re.findall(r"\d+", host.os_version)[:2])
    if host.os_id == "ubuntu" and release <= UBUNTU_WITHOUT_PACKAGES:
        raise Refused(
            "Ubuntu 22.04 or newer, or Debian 12 or newer",
            "Ubuntu {}, for which neither NVIDIA nor Ubuntu publishes supported drivers".format(host.os_version),
            "upgrade the host, or install a driver by hand: the role adopts one that runs",
        )
    if source == "auto":
        signed = host.os_id == "ubuntu" and host.secure_boot and not wishes["own_keys"] and host.board != "nvlink5"
        source = "ubuntu" if signed else "nvidia"
    if source == "ubuntu" and host.os_id != "ubuntu":
        raise Refused("nvidia_driver_source: nvidia", "{} has no such archive".format(host.os_id), "set it")
    if source == "ubuntu" and host.board == "nvlink5":
        found = "Ubuntu's archive, which has no nvlsm"
        raise Refused("NVIDIA's repository for a board with NVLink 5", found, "set nvidia_driver_source: nvidia")
    kernel = tuple(int(part) for part in re.findall(r"\d+", host.kernel)[:2])
    if host.board == "nvlink5" and kernel < NVLINK5_KERNEL:
        raise Refused("kernel 5.17 or newer for a board with NVLink 5", host.kernel, "install a newer kernel")
    return source


def _modules(host, wishes, branch):
    old = [each for each in host.pci_ids if each < FIRST_OPEN_GPU]
    modules = wishes["modules"]
    if modules == "auto":
        modules = "proprietary" if old else "open"
    if modules == "open" and old:
        ids = ", ".join("10de:{:04x}".format(each) for each in sorted(set(old)))
        found = "GPUs older than Turing ({})".format(ids)
        raise Refused(
            "GPUs of Turing or newer for open kernel modules", found, "set nvidia_driver_modules: proprietary"
        )
    if modules == "proprietary" and branch > LAST_PROPRIETARY_BRANCH:
        found = "branch {}, which has open kernel modules only".format(branch)
        raise Refused("branch 610 or older for proprietary kernel modules", found, "set nvidia_driver_branch: '580'")
    if modules == "proprietary" and host.board == "nvlink5":
        raise Refused("open kernel modules on a board with NVLink 5", "proprietary", "set nvidia_driver_modules: open")
    return modules


def _of_nvidia(host, branch, modules):
    """Return the packages of the driver's version and the others, by their names in NVIDIA's repository."""
    suffix = "" if branch >= NO_BRANCH_IN_NAMES else "-{}".format(branch)
    if host.os_id == "debian":
        kernel = "nvidia-kernel-open-dkms" if modules == "open" else "nvidia-kernel-dkms"
        versioned = ["nvidia-driver-cuda", kernel, "nvidia-persistenced"]
    else:
        versioned = [("nvidia-open" if modules == "open" else "cuda-drivers") + suffix]
    others = ["zstd"] if (host.os_id, host.os_version) == ("ubuntu", "26.04") else []
    if host.board in ("nvswitch", "nvlink5"):
        versioned.append("nvidia-fabricmanager" + ("" if branch >= 580 else suffix))
    if host.board == "nvlink5":
        others += ["nvlsm", "libnvsdm"] if branch >= NO_BRANCH_IN_NAMES else ["nvlink5" + suffix, "nvlsm"]
        others += ["infiniband-diags", "libibumad3"]
        others += _modules_extra(host) if host.os_id == "ubuntu" else []
    return versioned, others


def _modules_extra(host):
    """Return the packages with ib_umad and mlx5_ib of Ubuntu's kernels.

    The metapackage of the generic kernel brings its own; those of the clouds have one beside them. The archive soon drops
    the package of a kernel that is no longer the newest, so that this is named only if nothing else is there.
    """
    own = "linux-modules-extra-" + host.kernel
    clouds = [flavor for flavor in _flavors(host) if re.match("aws|azure|gcp|gke|oracle", flavor)]
    return [own] if own in host.packages or not clouds else ["linux-modules-extra-" + flavor for flavor in clouds]


def _flavors(host):
    """Return the endings of the kernel's metapackages, such as generic, or the releases of kernels without one."""
    endings = [name[len("linux-headers-") :] for name in headers(host)]
    return [each for each in endings if not each[0].isdigit()] or endings or [host.kernel]


def _of_ubuntu(host, branch, modules):
    """Return the packages of the driver's version and the others, by their names in Ubuntu's archive."""
    kind = "-open" if modules == "open" else ""
    versioned = ["nvidia-headless-no-dkms-{}-server{}".format(branch, kind), "nvidia-utils-{}-server".format(branch)]
    if host.board == "nvswitch":
        versioned.append("nvidia-fabricmanager-{}".format(branch))
    # The archive soon drops the modules of a kernel that is no longer the newest: the metapackages are always there.
    prefix = "linux-modules-nvidia-{}-server{}-".format(branch, kind)
    return versioned, [prefix + flavor for flavor in _flavors(host)]


def common_version(madison, names, wanted):
    """Return the newest version of `wanted` (a branch or a version) that all packages have, without its revision, or None.

    Revisions after the version differ among repositories and packages: -1, -1ubuntu1, -2, -0ubuntu0.24.04.1.

    Args:
        madison: the output of `apt-cache madison` for the packages.
        names: the packages of the driver's version.
    """
    offered = {name: set() for name in names}
    for line in madison.splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) >= 2 and cells[0] in offered:
            offered[cells[0]].add(upstream(cells[1]))
    common = set.intersection(*offered.values()) if offered else set()
    fit = [each for each in common if is_version(each, wanted)]
    return max(fit, key=lambda each: [int(part) for part in re.findall(r"\d+", each)], default=None)


def upstream(version):
    """Return a package's version without its epoch and revision: 1:580.95.05-1ubuntu1 → 580.95.05."""
    return re.sub(r"^\d+:", "", version).split("-")[0]


def reboot_decision(mode, why_due, may, busy):
    """Return what to do about a reboot that is due: "none", "now", "ask", "deferred", "never" or "blocked".

    Args:
        mode: nvidia_driver_reboot: never, when_idle or ask.
        why_due: why other modules must be in the kernel, or an empty text.
        may: False if the next boot would break something.
        busy: what runs on the host, or an empty text. A running job is never ended.
    """
    if not why_due:
        return "none"
    if not may:
        return "blocked"
    if mode != "when_idle":
        return mode
    return "deferred" if busy else "now"
