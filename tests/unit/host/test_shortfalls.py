"""Every shortfall of a host is reported, and a host without one passes."""

import copy

import pytest
from ansible.module_utils.mixtral_run_host import shortfalls

GOOD = {
    "os": {"id": "ubuntu", "version": "22.04", "codename": "jammy", "name": "Ubuntu 22.04"},
    "architecture": "amd64",
    "gpus": [{"index": index, "memory_gib": 79.6} for index in range(8)],
    "driver": {"user": "550.54.15", "kernel": "550.54.15", "error": None},
    "fabric_manager": {"nvswitch": True, "active": True, "version": "550.54.15"},
    "memory": {"ram_gib": 125.4, "swap_gib": 0.0},
    "disks": [{"path": "/data", "free_gib": 900.0, "filesystem": "ext4"}],
    "dns": {"pypi.org": None},
    "mirrors": {"https://pypi.org": None},
    "clock_offset_seconds": 0.4,
    "clock_synchronized": True,
}
LIMITS = {
    "os": {"ubuntu": "20.04", "debian": "12"},
    "architecture": "amd64",
    "num_gpus": 8,
    "gpu_memory_gib": 32,
    "driver_version": "525",
    "ram_gib": 128,
    "planned_swap_gib": 0,
    "swap_target_gib": 128,
    "free_gib": 500,
    "clock_offset_seconds": 30,
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
        ("driver", "fail", "driver 470.82.01", {"driver": {"user": "470.82.01", "kernel": None, "error": None},
                                                "fabric_manager__nvswitch": False}),
        ("driver_agreement", "fail", "kernel module 550.54.14, library 550.54.15", {"driver__kernel": "550.54.14"}),
        ("fabric_manager", "fail", "it is not running", {"fabric_manager__active": False}),
        ("fabric_manager", "fail", "fabric manager 535.1", {"fabric_manager__version": "535.1"}),
        ("ram", "fail", "64 GiB of RAM and 0 GiB of swap", {"memory__ram_gib": 64.0}),
        ("ram", "warn", "64 GiB of RAM and 64 GiB of swap", {"memory": {"ram_gib": 64.0, "swap_gib": 64.0}}),
        ("disk", "fail", "100 GiB free (ext4)", {"disks": [{"path": "/", "free_gib": 100.0, "filesystem": "ext4"}]}),
        ("dns", "fail", "no such name", {"dns": {"pypi.org": "no such name"}}),
        ("mirrors", "fail", "timed out", {"mirrors": {"https://m": "timed out"}}),
        ("clock", "fail", "+600 s", {"clock_offset_seconds": 600.0}),
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
        ("570.172.08", "install nvidia-fabricmanager-570=570.172.08-1`"),
        ("580.65.06", "install nvidia-fabricmanager=580.65.06-1` (in Ubuntu's own archive nvidia-fabricmanager-580)"),
        (None, "install the driver first"),
    ],
)
def test_fabric_manager_goes_by_the_name_that_its_branch_has(driver: str | None, words: str) -> None:
    items = _collect(driver__user=driver, driver__kernel=driver, fabric_manager__active=False)
    (item,) = [item for item in items if item.check == "fabric_manager"]
    assert words in item.remedy and "None" not in item.remedy and "enable --now" in item.remedy


def test_a_mismatch_is_reported_by_both_its_signs() -> None:
    error = "Failed to initialize NVML: Driver/library version mismatch"
    checks = {item.check for item in _collect(gpus=[], driver={"user": None, "kernel": None, "error": error})}
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


def test_what_the_kit_holds_there_counts_as_free_and_is_reported() -> None:
    disk = {"path": "/data", "free_gib": 100.0, "filesystem": "ext4"}
    assert _collect(disks=[{**disk, "held_gib": 400.0}]) == []
    (item,) = _collect(disks=[{**disk, "held_gib": 399.0}])
    assert item.found.startswith("100 GiB free (ext4), and 399 GiB that checkpoints and HF cache hold")


def test_versions_compare_as_numbers() -> None:
    assert shortfalls.version("9.10") > shortfalls.version("9.9")
    assert shortfalls.version("525.85.12") >= shortfalls.version("525")
