"""Every shortfall of a host is reported, and a host without one passes."""

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import shortfalls
from ansible.module_utils.mixtral_run_host.gpu import gpu_shortfalls

from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

GOOD = {
    "os": {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04"},
    "architecture": "amd64",
    "gpus": [{"index": index, "memory_gib": 79.6} for index in range(8)],
    "driver": {
        "user": "580.173.02", "kernel": "580.173.02", "error": None, "on_disk": "580.173.02",
        "newest_kernel": "6.8.0-45-generic", "in_newest_kernel": "580.173.02",
    },
    "gpu_modes": {"persistence_mode": ["Enabled"] * 8, "mig.mode.current": ["Disabled"] * 8},
    "fabric_manager": {
        "nvswitch": True, "nvlink5": False, "active": True, "version": "580.173.02", "missing": [],
        "state": ["Completed"] * 8, "status": ["Success"] * 8,
    },
    "printed_at_login": "",
    "memory": {"ram_gib": 125.4, "swap_gib": 0.0},
    "space": [],
    "dns": {"pypi.org": None},
    "mirrors": {"https://pypi.org": None},
    "clock_offset_seconds": 0.4,
    "clock_synchronized": True,
    "time_services": ["chrony"],
    "firewall": None,
    "rdma": {"devices": [], "gpudirect": None},
}  # fmt: skip
LIMITS = {
    "os": {"ubuntu": "20.04", "debian": "12"},
    "architecture": "amd64",
    "num_gpus": 8,
    "gpu_memory_gib": 32,
    "driver_version": "525",
    "driver_supported": "580",
    "ram_gib": 128,
    "planned_swap_gib": 0,
    "swap_target_gib": 128,
    "clock_offset_seconds": 30,
    "num_hosts": 2,
}


def _collect(levels: dict | None = None, **changes: object) -> list:
    state = copy.deepcopy(GOOD)
    for path, value in changes.items():
        *parents, key = path.split("__")
        place = state
        for parent in parents:
            place = place[parent]
        place[key] = value
    return shortfalls.collect(state, LIMITS, levels or {})


def test_a_good_host_has_none() -> None:
    assert _collect() == []


@pytest.mark.parametrize(
    ("check", "level", "found", "changes"),
    [
        ("os", "fail", "Bionic", {"os": {"id": "ubuntu", "version": "18.04", "codename": "b", "name": "Bionic"}}),
        ("os", "fail", "Fedora 40", {"os": {"id": "fedora", "version": "40", "codename": "", "name": "Fedora 40"}}),
        ("os", "warn", "focal", {"os": {"id": "ubuntu", "version": "20.04", "codename": "", "name": "focal"}}),
        ("architecture", "fail", "arm64", {"architecture": "arm64"}),
        ("gpus", "fail", "4 GPUs", {"gpus": GOOD["gpus"][:4]}),
        ("gpu_memory", "fail", "GPU 1 has 23.6 GiB", {"gpus": [*GOOD["gpus"], {"index": 1, "memory_gib": 23.6}]}),
        ("driver", "fail", "driver 470.82.01", {"driver__user": "470.82.01", "driver__kernel": None,
                                                "fabric_manager__nvswitch": False}),
        ("driver", "warn", "driver 535.230.02", {"driver__user": "535.230.02", "driver__kernel": None,
                                                 "fabric_manager__nvswitch": False}),
        ("driver_agreement", "fail", "kernel module 580.65.06, library 580.173.02",
         {"driver__kernel": "580.65.06", "driver__in_newest_kernel": None, "driver__on_disk": None}),
        ("driver_next_boot", "warn", "6.8.0-45-generic has no NVIDIA module: after a reboot the host has no GPUs",
         {"driver__in_newest_kernel": ""}),
        ("driver_next_boot", "warn", "no NVIDIA module and no headers to build one",
         {"driver__in_newest_kernel": "", "driver__headers": False}),
        ("driver_next_boot", "warn", "module 580.95.05 for kernel 6.8.0-45-generic, library 580.173.02",
         {"driver__in_newest_kernel": "580.95.05", "driver__library": "580.173.02", "fabric_manager__nvswitch": False}),
        ("driver_next_boot", "warn", "is not signed", {"driver__secure_boot": True, "driver__signer": ""}),
        ("driver_next_boot", "warn", "the next reboot changes the driver; fabric manager 580.173.02 stays",
         {"driver__in_newest_kernel": "595.71.05"}),
        ("driver_lock", "warn", "may change libnvidia-compute, libnvidia-gl, nvidia-dkms and 1 more",
         {"driver__open_to_upgrades": ["libnvidia-compute", "libnvidia-gl", "nvidia-dkms", "nvidia-utils"]}),
        ("driver_next_boot", "warn", "580.173.02 loaded, 595.71.05 on disk", {"driver__in_newest_kernel": "595.71.05"}),
        ("driver_next_boot", "warn", "580.173.02 loaded, 580.200.01 on disk",
         {"driver__newest_kernel": None, "driver__in_newest_kernel": None, "driver__on_disk": "580.200.01"}),
        ("fabric_manager", "fail", "it is not running", {"fabric_manager__active": False}),
        ("fabric_manager", "fail", "fabric manager 535.1", {"fabric_manager__version": "535.1"}),
        ("fabric_manager", "fail", "GPU 1: In Progress, N/A",
         {"fabric_manager__state": ["Completed", "In Progress"], "fabric_manager__status": ["Success", "N/A"]}),
        ("fabric_manager", "fail", "GPU 0: Completed, Insufficient Resources",
         {"fabric_manager__state": ["Completed"], "fabric_manager__status": ["Insufficient Resources"]}),
        ("fabric_manager", "fail", "missing: package nvlsm", {"fabric_manager__missing": ["package nvlsm"]}),
        ("mig", "fail", "MIG mode on GPU 0, 2", {"gpu_modes__mig.mode.current": ["Enabled", "[N/A]", "Enabled"]}),
        ("persistence", "warn", "off on GPU 0", {"gpu_modes__persistence_mode": ["Disabled", "Enabled"]}),
        ("login", "warn", "Welcome to the machine", {"printed_at_login": "Welcome to the machine"}),
        ("ram", "fail", "64 GiB of RAM and 0 GiB of swap", {"memory__ram_gib": 64.0}),
        ("ram", "warn", "64 GiB of RAM and 64 GiB of swap", {"memory": {"ram_gib": 64.0, "swap_gib": 64.0}}),
        ("dns", "fail", "no such name", {"dns": {"pypi.org": "no such name"}}),
        ("mirrors", "fail", "timed out", {"mirrors": {"https://m": "timed out"}}),
        ("clock", "fail", "+600 s", {"clock_offset_seconds": 600.0}),
        ("clock", "fail", "-600 s", {"clock_offset_seconds": -600.0}),
        ("clock", "fail", "-31 s", {"clock_offset_seconds": -31.0}),
        ("clock", "fail", "no time service", {"clock_offset_seconds": None, "clock_synchronized": False}),
    ],
)  # fmt: skip
def test_each_shortfall(check: str, level: str, found: str, changes: dict) -> None:
    (item,) = _collect(**changes)
    assert (item.check, item.level) == (check, level)
    assert found in item.found and item.expected and item.remedy


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ("570.172.08", "install 'nvidia-fabricmanager-570=570.172.08-*'`"),
        ("580.65.06", "install 'nvidia-fabricmanager=580.65.06-*'` (in Ubuntu's own archive nvidia-fabricmanager-580)"),
        (None, "install the driver first"),
    ],
)
def test_fabric_manager_goes_by_the_name_that_its_branch_has(driver: str | None, words: str) -> None:
    items = _collect(driver__user=driver, driver__kernel=None, fabric_manager__active=False)
    (item,) = [item for item in items if item.check == "fabric_manager"]
    assert words in item.remedy and "None" not in item.remedy and "enable --now" in item.remedy


def test_a_mismatch_is_reported_by_both_its_signs() -> None:
    error = "Failed to initialize NVML: Driver/library version mismatch"
    checks = {item.check for item in _collect(gpus=[], driver__user=None, driver__kernel=None, driver__error=error)}
    assert checks == {"gpus", "driver", "driver_agreement"}


def test_all_are_reported_at_once_with_the_hosts_name() -> None:
    found = _collect(gpus=GOOD["gpus"][:4], memory__ram_gib=8.0, architecture="arm64")
    text = shortfalls.render("gpu-07", found)
    assert "gpu-07 is not ready: 3 shortfalls." in text
    assert all(word in text for word in ("4 GPUs", "8 GiB of RAM", "arm64", "next:"))


@pytest.mark.parametrize(("level", "expected"), [("warn", ["warn"]), ("skip", [])])
def test_a_check_can_be_eased(level: str, expected: list) -> None:
    assert [item.level for item in _collect({"gpus": level}, gpus=[])] == expected


@pytest.mark.parametrize(
    ("planned", "target", "is_short"), [(64, 0, False), (-1, 128, False), (-1, 64, True), (8, 128, True)]
)
def test_swap_that_the_kit_is_going_to_make_counts_as_ram(planned: float, target: float, is_short: bool) -> None:
    state = copy.deepcopy(GOOD)
    state["memory"] = {"ram_gib": 64.0, "swap_gib": 0.0}
    found = shortfalls.collect(state, {**LIMITS, "planned_swap_gib": planned, "swap_target_gib": target}, {})
    assert [item.check for item in found] == (["ram"] if is_short else [])


def test_before_a_reboot_into_another_driver_its_fabric_manager_is_installed() -> None:
    (item,) = _collect(driver__in_newest_kernel="595.71.05")
    assert "install 'nvidia-fabricmanager=595.71.05-*'" in item.remedy
    (item,) = _collect(driver__in_newest_kernel="595.71.05", fabric_manager__nvswitch=False)
    assert "fabricmanager" not in item.remedy


def test_a_host_without_a_driver_is_sent_to_the_role_that_installs_one() -> None:
    (item,) = _collect({"gpus": "skip"}, gpus=[], driver__user=None, driver__kernel=None, driver__error="no driver",
                       fabric_manager__nvswitch=False)  # fmt: skip
    assert item.remedy.startswith("`mixtral-run bootstrap HOST --tags nvidia_driver")


def test_drivers_that_do_not_tell_of_the_fabric_pass() -> None:
    assert _collect(fabric_manager__state=[], fabric_manager__status=[]) == []
    assert _collect(fabric_manager__state=["[N/A]"], fabric_manager__status=["[N/A]"]) == []


DPKG_STATUS = """Package: {name}
Status: {status}
Maintainer: nobody
Architecture: all
Version: 1
Description: stand-in

"""


@pytest.mark.skipif(not shutil.which("dpkg"), reason="needs dpkg")
def test_the_command_that_holds_packages_holds_every_part(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    installed = {
        "nvidia-driver-580-open", "libnvidia-compute-580", "nvidia-dkms-580-open", "nvidia-fabricmanager",
        "linux-modules-nvidia-580-server-open-generic", "linux-image-6.8.0-45-generic", "linux-headers-generic",
        "linux-generic",
    }  # fmt: skip
    others = {"bash": "install ok installed", "nvidia-old": "deinstall ok config-files"}
    packages = {**dict.fromkeys(installed, "install ok installed"), **others}
    (tmp_path / "db/info").mkdir(parents=True)
    (tmp_path / "db/updates").mkdir()
    text = "".join(DPKG_STATUS.format(name=name, status=status) for name, status in packages.items())
    (tmp_path / "db/status").write_text(text)
    programs.put("dpkg", f'exec {shutil.which("dpkg", path="/usr/bin:/bin")} --admindir={tmp_path}/db "$@"')
    programs.put("sudo")
    subprocess.run(["sh", "-c", gpu_shortfalls.HOLD], check=True)
    (called,) = programs.calls("sudo")
    assert called.split()[:3] == ["sudo", "apt-mark", "hold"] and set(called.split()[3:]) == installed


def test_versions_compare_as_numbers() -> None:
    assert shortfalls.version("9.10") > shortfalls.version("9.9")
    assert shortfalls.version("525.85.12") >= shortfalls.version("525")


def test_numbers_that_are_text_are_compared_as_numbers() -> None:
    """`-e preflight_free_gib=1` of Ansible passes text."""
    texts = {name: str(value) if isinstance(value, int) else value for name, value in LIMITS.items()}
    limits = shortfalls.with_numbers(texts)
    assert limits == LIMITS and limits["driver_version"] == "525"
    assert shortfalls.collect(GOOD, limits, {}) == []
    (found,) = shortfalls.collect(GOOD, shortfalls.with_numbers({**LIMITS, "num_gpus": "9"}), {})
    assert found.expected == "9 GPUs"


def test_a_conflict_with_the_engine_is_a_shortfall_and_a_warning_stays_one() -> None:
    conflicts = [("fail", "a", "b", "c"), ("warn", "d", "e", "f")]
    found = _collect(engine_conflicts=conflicts)
    assert [tuple(each) for each in found] == [("engine", *("fail", "a", "b", "c")), ("engine", "warn", "d", "e", "f")]
    assert [each.level for each in _collect({"engine": "warn"}, engine_conflicts=conflicts)] == ["warn", "warn"]


@pytest.mark.parametrize(
    ("changes", "checks"),
    [
        # 32 GiB of a GPU and 128 GiB of RAM may lack a twentieth: 30.4 and 121.6.
        ({"gpus": [{"index": 0, "memory_gib": 30.4}] * 8}, []),
        ({"gpus": [{"index": 0, "memory_gib": 30.39}] * 8}, ["gpu_memory"]),
        ({"memory": {"ram_gib": 121.6, "swap_gib": 0.0}}, []),
        ({"memory": {"ram_gib": 121.5, "swap_gib": 0.0}}, ["ram"]),
        ({"memory": {"ram_gib": 100.0, "swap_gib": 21.6}}, ["ram"]),
        ({"gpus": [*GOOD["gpus"], *GOOD["gpus"]]}, []),
        ({"clock_offset_seconds": 30.0}, []),
        ({"clock_offset_seconds": -30.0}, []),
        ({"clock_offset_seconds": 30.5}, ["clock"]),
        ({"clock_offset_seconds": None}, []),
        ({"clock_offset_seconds": None, "clock_synchronized": None, "time_services": []}, ["clock"]),
        ({"os": {"id": "ubuntu", "version": "24.04", "codename": "", "name": "noble"}}, []),
        ({"os": {"id": "debian", "version": "12", "codename": "", "name": "bookworm"}}, []),
        ({"os": {"id": "", "version": "", "codename": "", "name": ""}}, ["os"]),
        ({"dns": {"a": None, "b": None}, "mirrors": {}}, []),
    ],
)
def test_at_its_limit_a_host_passes(changes: dict, checks: list[str]) -> None:
    assert [item.check for item in _collect(**changes)] == checks


def test_words_of_a_shortfall() -> None:
    (item,) = _collect(os={"id": "", "version": "", "codename": "", "name": ""})
    assert item[2:] == ("debian 12 or newer or ubuntu 20.04 or newer", "no /etc/os-release",
                        "install the host with one of these systems")  # fmt: skip
    (item,) = _collect(memory={"ram_gib": 100.0, "swap_gib": 21.6})
    assert item[1:4] == ("warn", "128 GiB of RAM", "100 GiB of RAM and 21.6 GiB of swap")
    (item,) = _collect({"driver": "skip", "driver_agreement": "skip"}, gpus=[], driver__error="it hangs")
    assert item.found == "0 GPUs (it hangs)"
    (item,) = _collect(printed_at_login="x" * 100)
    assert item.found == repr("x" * 80)
    assert [each.expected for each in _collect(clock_offset_seconds=90.4)] == ["a clock within 30 s"]
    assert shortfalls.render("h", [item]).splitlines()[::3] == [
        "h is not ready: 1 shortfall.",
        "  nothing was changed; a check can be set to warn or skip: preflight_checks: {login: warn}",
    ]
    # Where the host has more RAM than swap is to make up for, none is planned.
    assert shortfalls.planned_swap(200.0, {"planned_swap_gib": "-1", "swap_target_gib": "128"}) == 0
    assert shortfalls.planned_swap(100.0, {"planned_swap_gib": -0.5, "swap_target_gib": 128}) == 28.0
    assert shortfalls.planned_swap(200.0, {"planned_swap_gib": 0, "swap_target_gib": 999}) == 0


def test_what_status_warns_of_besides_the_driver() -> None:
    assert gpu_shortfalls.remarks(GOOD) == []
    state = copy.deepcopy(GOOD)
    state["driver"]["open_to_upgrades"] = ["a", "b", "c"]
    state["gpu_modes"] = {"persistence_mode": ["Enabled", "Disabled"], "mig.mode.current": ["Enabled", "Disabled"]}
    state["rdma"] = {"devices": [{"name": "mlx5_0"}, {"name": "mlx5_1"}], "gpudirect": None}
    state["fabric_manager"].update(state=["Completed", "In Progress"], status=["Success", "N/A"])
    assert gpu_shortfalls.remarks(state) == [
        "unattended upgrades may change a, b, c: library and loaded module would differ until a reboot; expected "
        "packages of the driver that no night's upgrade changes",
        "MIG mode on GPU 0; expected whole GPUs: jobs use no MIG instances",
        "off on GPU 1; expected persistence mode on each GPU",
        "neither, for mlx5_0, mlx5_1; expected GPUDirect RDMA by DMA-BUF or nvidia-peermem",
        "GPU 1: In Progress, N/A; expected fabric.state Completed and fabric.status Success on each GPU",
    ]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        # At the oldest version that is enough, and at the oldest that gets fixes.
        ({"driver__user": "525"}, [("driver", "warn")]),
        ({"driver__user": "524.99"}, [("driver", "fail")]),
        ({"driver__user": "580"}, []),
        ({"driver__user": "579.99.9"}, [("driver", "warn")]),
        ({"driver__user": None}, [("driver", "fail")]),
        ({"driver__user": None, "driver__error": "it hangs"}, [("driver", "fail")]),
    ],
)
def test_versions_at_the_limit(changes: dict, found: list[tuple[str, str]]) -> None:
    items = _collect(driver__kernel=None, fabric_manager__nvswitch=False, **changes)
    assert [item[:2] for item in items] == found
    if changes["driver__user"] is None:
        assert items[0].found == changes.get("driver__error", "none")


def test_a_host_without_gpus_needs_no_driver() -> None:
    state = copy.deepcopy(GOOD)
    state["driver"].update(user=None, kernel=None)
    state["fabric_manager"]["nvswitch"] = False
    assert shortfalls.collect(state, {**LIMITS, "num_gpus": 0}, {}) == []
