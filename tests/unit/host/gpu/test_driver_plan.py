"""Source, kernel modules and packages of the driver by system, board, GPU, branch and Secure Boot."""

import pytest
from ansible.module_utils.mixtral_run_host.gpu import driver_plan
from ansible.module_utils.mixtral_run_host.gpu.driver_plan import Host, Refused

H100, V100, B200 = 0x2330, 0x1DB5, 0x2901
UBUNTU = Host(
    os_id="ubuntu", os_version="24.04", kernel="6.8.0-45-generic", packages={"linux-image-generic": "6.8"},
    pci_ids=[H100] * 8, board="nvswitch", secure_boot=False, loaded=None, library=None, error="none",
)  # fmt: skip
DEBIAN = UBUNTU._replace(
    os_id="debian", os_version="12", kernel="6.1.0-37-amd64", packages={"linux-image-amd64": "6.1"}
)
DEFAULTS = {"branch": "", "version": "", "source": "auto", "modules": "auto", "packages": [], "own_keys": False,
            "gpus_wanted": True}  # fmt: skip


def plan(host: Host, **wishes: object) -> driver_plan.Plan:
    return driver_plan.plan(host, {**DEFAULTS, **wishes})


# The names are those of NVIDIA's guide and of Ubuntu's server documentation, branch by branch.
PACKAGES = {
    "Ubuntu, HGX H100, 580": (
        UBUNTU, {}, ["nvidia-open-580", "nvidia-fabricmanager", "linux-headers-generic"], "nvidia-driver-pinning-",
    ),
    "Ubuntu, PCIe": (
        UBUNTU._replace(board="pcie"), {}, ["nvidia-open-580", "linux-headers-generic"], "nvidia-driver-pinning-",
    ),
    "Ubuntu, 595, whose names have no branch": (
        UBUNTU, {"branch": "595"}, ["nvidia-open", "nvidia-fabricmanager", "linux-headers-generic"],
        "nvidia-driver-pinning-",
    ),
    "Ubuntu, 570, before the pinning packages": (
        UBUNTU, {"version": "570.133.20"}, ["nvidia-open-570", "nvidia-fabricmanager-570", "linux-headers-generic"], "",
    ),
    "Ubuntu, Volta": (
        UBUNTU._replace(pci_ids=[V100], board="pcie"), {}, ["cuda-drivers-580", "linux-headers-generic"],
        "nvidia-driver-pinning-",
    ),
    "Ubuntu, HGX B200, 595": (
        UBUNTU._replace(pci_ids=[B200], board="nvlink5"), {"branch": "595"},
        [
            "nvidia-open", "nvidia-fabricmanager", "nvlsm", "libnvsdm", "infiniband-diags", "libibumad3",
            "linux-modules-extra-6.8.0-45-generic", "linux-headers-generic",
        ],
        "nvidia-driver-pinning-",
    ),
    "Debian, HGX H100": (
        DEBIAN, {},
        [
            "nvidia-driver-cuda", "nvidia-kernel-open-dkms", "nvidia-persistenced", "nvidia-fabricmanager",
            "linux-headers-amd64",
        ],
        "nvidia-driver-pinning-",
    ),
    "Ubuntu's archive under Secure Boot": (
        UBUNTU._replace(secure_boot=True), {},
        [
            "nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server", "nvidia-fabricmanager-580",
            "linux-modules-nvidia-580-server-open-generic",
        ],
        "",
    ),
    "Ubuntu's archive, which drops the modules of older kernels": (
        UBUNTU._replace(
            secure_boot=True, board="pcie",
            packages=dict.fromkeys(["linux-image-generic", "linux-image-6.8.0-45-generic"], "1"),
        ), {},
        [
            "nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server",
            "linux-modules-nvidia-580-server-open-generic",
        ],
        "",
    ),
    "Ubuntu's archive and a kernel without a metapackage": (
        UBUNTU._replace(secure_boot=True, board="pcie", packages={"linux-image-6.8.0-45-generic": "1"}), {},
        [
            "nvidia-headless-no-dkms-580-server-open", "nvidia-utils-580-server",
            "linux-modules-nvidia-580-server-open-6.8.0-45-generic",
        ],
        "",
    ),
    "Ubuntu, HGX B200 in a cloud": (
        UBUNTU._replace(pci_ids=[B200], board="nvlink5", kernel="6.8.0-1-aws", packages={"linux-image-aws": "1"}),
        {"branch": "595"},
        [
            "nvidia-open", "nvidia-fabricmanager", "nvlsm", "libnvsdm", "infiniband-diags", "libibumad3",
            "linux-modules-extra-aws", "linux-headers-aws",
        ],
        "nvidia-driver-pinning-",
    ),
    "Secure Boot with the site's own key": (
        UBUNTU._replace(secure_boot=True, board="pcie"), {"own_keys": True},
        ["nvidia-open-580", "linux-headers-generic"], "nvidia-driver-pinning-",
    ),
    "packages of the operator": (
        UBUNTU, {"packages": ["nvidia-headless-580-open", "nvidia-utils-580"]},
        ["nvidia-headless-580-open", "nvidia-utils-580", "nvidia-fabricmanager", "linux-headers-generic"],
        "nvidia-driver-pinning-",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PACKAGES)
def test_packages(case: str) -> None:
    host, wishes, names, pinning = PACKAGES[case]
    found = plan(host, **wishes)
    assert (found.action, found.pinning) == ("install", pinning)
    assert found.packages == names
    free = {"infiniband-diags", "libibumad3"}
    assert set(found.leave_holds) == {name for name in names if name.startswith("linux-") or name in free}
    assert not set(found.versioned) & {"nvlsm", "libnvsdm", *found.leave_holds}


RUNS = {"loaded": "570.10.1", "library": "570.10.1", "error": None}
STAYS = {
    "any driver that runs": (RUNS, {}, "adopt"),
    "one of the wanted branch": (RUNS, {"branch": "570"}, "adopt"),
    "one of the wanted version": (RUNS, {"version": "570.10.1"}, "adopt"),
    "no GPU": ({"pci_ids": [], "board": ""}, {}, "none"),
    "a host that is used without its GPUs": ({}, {"gpus_wanted": False}, "none"),
    "a branch for such a host": ({}, {"gpus_wanted": False, "branch": "580"}, "install"),
    "one of another branch": ({**RUNS, "packages": {"nvidia-open-570": "570.10.1-1"}}, {"branch": "580"}, "install"),
    "the kit's own": ({**RUNS, "managed": True}, {}, "install"),
    "a sick GPU under the kit's own": ({**RUNS, "managed": True, "error": "sick"}, {}, "install"),
    "a sick GPU under another branch": (
        {**RUNS, "error": "sick", "packages": {"nvidia-open-570": "570.10.1-1"}},
        {"branch": "580"},
        "install",
    ),
    "a version of the branch": ({}, {"branch": "580", "version": "580.95.05"}, "install"),
}


@pytest.mark.parametrize("case", STAYS)
def test_a_driver_that_runs_is_adopted(case: str) -> None:
    differs, wishes, action = STAYS[case]
    assert plan(UBUNTU._replace(**differs), **wishes).action == action


def test_the_kits_driver_stays_in_its_branch() -> None:
    host = UBUNTU._replace(**RUNS, managed=True)
    assert plan(host).versioned == ["nvidia-open-570", "nvidia-fabricmanager-570"]


ANOTHER_IS_OWNED = {"packages": {"nvidia-open-570": "570.10.1-1"}}
REFUSED = {
    "a branch with a letter": (UBUNTU, {"branch": "R580"}, "'R580'"),
    "a branch as in the names of packages": (UBUNTU, {"branch": "580-server"}, "'580-server'"),
    "a version as a branch": (UBUNTU, {"branch": "580.95.05"}, "'580.95.05'"),
    "a version with a revision": (UBUNTU, {"version": "580.95.05-1ubuntu1"}, "'580.95.05-1ubuntu1'"),
    "a branch as a version": (UBUNTU, {"version": "580"}, "'580'"),
    "a version of another branch": (UBUNTU, {"version": "570.133.20", "branch": "580"}, "570.133.20"),
    "a sick GPU under the wanted branch": (
        UBUNTU._replace(**{**RUNS, "error": "Unable to determine the device handle"}, **ANOTHER_IS_OWNED),
        {"branch": "570"}, "device handle",
    ),
    "a sick GPU under a driver of the .run installer": (
        UBUNTU._replace(**{**RUNS, "error": "Unable to determine the device handle"}), {}, "is complete",
    ),
    "Secure Boot on Debian": (DEBIAN._replace(secure_boot=True), {}, "unsigned modules"),
    "Secure Boot and NVLink 5": (UBUNTU._replace(secure_boot=True, board="nvlink5"), {}, "unsigned modules"),
    "Ubuntu 20.04": (UBUNTU._replace(os_version="20.04"), {}, "Ubuntu 20.04"),
    "Ubuntu's archive on Debian": (DEBIAN, {"source": "ubuntu"}, "no such archive"),
    "Ubuntu's archive and NVLink 5": (UBUNTU._replace(board="nvlink5"), {"source": "ubuntu"}, "no nvlsm"),
    "an old kernel and NVLink 5": (UBUNTU._replace(board="nvlink5", kernel="5.15.0-1-generic"), {}, "5.15"),
    "open modules for Volta": (UBUNTU._replace(pci_ids=[V100]), {"modules": "open"}, "10de:1db5"),
    "Volta and a branch without proprietary modules": (UBUNTU._replace(pci_ids=[V100]), {"branch": "620"}, "620"),
    "proprietary modules and NVLink 5": (UBUNTU._replace(board="nvlink5"), {"modules": "proprietary"}, "proprietary"),
    "the .run installer": (UBUNTU._replace(library="570.10.1"), {"branch": "580"}, "no package owns"),
    "somebody's driver that does not run": (
        UBUNTU._replace(packages={"nvidia-open-570": "570.10.1-1"}, error="version mismatch"), {}, "version mismatch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case: str) -> None:
    host, wishes, found = REFUSED[case]
    with pytest.raises(Refused) as refused:
        plan(host, **wishes)
    assert found in refused.value.found and refused.value.expected and refused.value.step


@pytest.mark.parametrize(
    ("packages", "kernel", "names"),
    [
        (["linux-image-generic", "linux-image-6.8.0-45-generic"], "6.8.0-45-generic",
         ["linux-headers-6.8.0-45-generic", "linux-headers-generic"]),
        (["linux-image-generic-hwe-24.04"], "6.14.0-1-generic", ["linux-headers-generic-hwe-24.04"]),
        (["linux-image-aws", "linux-image-6.8.0-1-aws"], "6.8.0-2-aws", ["linux-headers-aws"]),
        (["linux-image-cloud-amd64"], "6.1.0-37-cloud-amd64", ["linux-headers-cloud-amd64"]),
        (["linux-image-unsigned-6.8.0-45-generic"], "6.8.0-45-generic", ["linux-headers-6.8.0-45-generic"]),
        (["bash", "linux-headers-generic"], "6.18.44-custom", []),
    ],
)  # fmt: skip
def test_headers_of_the_kernel_and_of_the_next_ones(packages: list[str], kernel: str, names: list[str]) -> None:
    host = UBUNTU._replace(packages=dict.fromkeys(packages, "1"), kernel=kernel)
    assert driver_plan.headers(host) == names


MADISON = """
nvidia-open-580 | 580.173.02-1ubuntu1 | https://mirror/cuda Packages
nvidia-open-580 | 580.95.05-0ubuntu1 | https://mirror/cuda Packages
nvidia-open-580 | 580.200.01-1 | https://mirror/cuda Packages
nvidia-fabricmanager | 595.71.05-1ubuntu1 | https://mirror/cuda Packages
nvidia-fabricmanager | 580.173.02-1 | https://mirror/cuda Packages
nvidia-fabricmanager | 1:580.95.05-1 | https://mirror/cuda Packages
"""


@pytest.mark.parametrize(
    ("wanted", "version"),
    # 580.200.01 has no fabric manager, and 173 is more than 95 as a number alone.
    [("580", "580.173.02"), ("580.95.05", "580.95.05"), ("580.200.01", None), ("595", None), ("58", None)],
)
def test_the_newest_version_that_all_packages_have(wanted: str, version: str | None) -> None:
    assert driver_plan.common_version(MADISON, ["nvidia-open-580", "nvidia-fabricmanager"], wanted) == version


@pytest.mark.parametrize(
    ("mode", "due", "may", "busy", "decision"),
    [
        ("when_idle", "", True, "", "none"),
        ("when_idle", "a module waits", True, "", "now"),
        ("when_idle", "a module waits", True, "2 containers running", "deferred"),
        ("when_idle", "a module waits", False, "", "blocked"),
        ("ask", "a module waits", True, "", "ask"),
        ("never", "a module waits", True, "", "never"),
        ("never", "a module waits", False, "", "blocked"),
    ],
)
def test_when_a_reboot_is_done(mode: str, due: str, may: bool, busy: str, decision: str) -> None:
    assert driver_plan.reboot_decision(mode, due, may, busy) == decision


FABRIC = ["nvidia-fabricmanager", "nvidia-open"]


@pytest.mark.parametrize(
    ("board", "packages", "managed", "kept"),
    [
        ("pcie", [*FABRIC, "nvlsm"], True, "nvlink5"),
        ("", FABRIC, True, "nvswitch"),
        ("pcie", ["nvidia-fabricmanager-570"], True, "nvswitch"),
        ("pcie", ["nvidia-open", "nvlsm", "nvidia-fabricmanager-dev"], True, "pcie"),
        ("pcie", FABRIC, False, "pcie"),
        ("nvlink5", FABRIC, True, "nvlink5"),
    ],
)
def test_a_board_that_is_misread_keeps_its_fabric_manager(
    board: str, packages: list[str], managed: bool, kept: str
) -> None:
    assert driver_plan.kept_board(board, packages, managed) == kept
