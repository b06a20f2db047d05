"""The truth table of a driver's parts: what works now, what the next boot breaks, and whether a reboot is allowed."""

import pytest
from ansible.module_utils.mixtral_run_host.gpu.driver_states import (
    Parts,
    findings,
    is_version,
    may_reboot,
    needs_reboot,
    works,
)

OLD, NEW = "580.95.05", "580.173.02"
K1, K2 = "6.8.0-44-generic", "6.8.0-45-generic"
SOUND = {
    "loaded": OLD, "on_disk": OLD, "library": OLD, "running_kernel": K1, "newest_kernel": K1, "in_newest_kernel": OLD,
    "headers": True, "fabric_manager": OLD, "needs_fabric_manager": True, "nouveau": False, "secure_boot": False,
    "signer": "", "target": OLD,
}  # fmt: skip
UPGRADED = {"on_disk": NEW, "library": NEW, "in_newest_kernel": NEW, "fabric_manager": NEW, "target": None}
BARE = {
    "loaded": None, "on_disk": "", "library": "", "in_newest_kernel": "", "fabric_manager": "", "target": "580",
}  # fmt: skip
NEW_KERNEL = {"newest_kernel": K2}

# what differs from a sound host; the findings; works now; may reboot; needs other modules in the kernel
ROWS = {
    "all parts agree": ({}, [], True, True, False),
    "bare host": (BARE, ["absent"], False, True, False),
    "bare host with nouveau": ({**BARE, "nouveau": True}, ["absent"], False, True, False),
    "installed and not loaded": ({"loaded": None}, ["not_loaded"], False, True, False),
    "installed under nouveau": ({"loaded": None, "nouveau": True}, ["nouveau"], False, True, True),
    "library without a module": (
        {"loaded": None, "on_disk": "", "in_newest_kernel": ""}, ["no_module"], False, True, False,
    ),
    "upgraded on disk, module and library": (UPGRADED, ["split", "pending"], False, True, True),
    "module upgraded, library not": (
        {"on_disk": NEW, "in_newest_kernel": NEW, "target": None},
        ["next_boot_split", "fabric_manager_split"], True, False, False,
    ),
    "library upgraded, module not": (
        {"library": NEW, "target": None}, ["split", "next_boot_split"], False, False, True,
    ),
    "pending, the library unknown": (
        {**UPGRADED, "library": None}, ["pending"], True, True, True,
    ),
    "new kernel with the module": (NEW_KERNEL, ["kernel_pending"], True, True, False),
    "new kernel without a module": (
        {**NEW_KERNEL, "in_newest_kernel": ""}, ["next_boot_without_module"], True, False, False,
    ),
    "new kernel without headers": (
        {**NEW_KERNEL, "in_newest_kernel": "", "headers": False}, ["next_boot_without_module"], True, False, False,
    ),
    "new kernel with a module of another version": (
        {**NEW_KERNEL, "in_newest_kernel": NEW}, ["next_boot_split", "fabric_manager_split"], True, False, False,
    ),
    "upgraded, and the new kernel has no module": (
        {**UPGRADED, **NEW_KERNEL, "in_newest_kernel": ""}, ["split", "next_boot_without_module"], False, False, True,
    ),
    "the module's file is gone, the module is loaded": (
        {"on_disk": "", "in_newest_kernel": ""}, ["next_boot_without_module"], True, False, False,
    ),
    "fabric manager upgraded alone": (
        {"fabric_manager": NEW}, ["fabric_manager_split"], False, True, False,
    ),
    "driver upgraded without its fabric manager": (
        {**UPGRADED, "fabric_manager": OLD}, ["split", "pending", "fabric_manager_split"], False, False, True,
    ),
    "no fabric manager on a board with switches": (
        {"fabric_manager": ""}, ["fabric_manager_missing"], False, True, False,
    ),
    "no fabric manager on a PCIe board": (
        {"fabric_manager": "", "needs_fabric_manager": False}, [], True, True, False,
    ),
    "Secure Boot and an unsigned module": ({"secure_boot": True}, ["next_boot_unsigned"], True, False, False),
    "Secure Boot and a signed module": ({"secure_boot": True, "signer": "Canonical Ltd."}, [], True, True, False),
    "another version than the wanted one": ({"target": "595"}, ["other_version"], True, True, False),
    "the wanted branch": ({"target": "580"}, [], True, True, False),
    "modinfo is not installed": (
        {"on_disk": None, "in_newest_kernel": None, "newest_kernel": None}, [], True, True, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_truth_table(row: str) -> None:
    differs, names, now, reboot, modules = ROWS[row]
    found = findings(Parts(**{**SOUND, **differs}))
    assert [each.name for each in found] == names
    assert (works(found), may_reboot(found), needs_reboot(found)) == (now, reboot, modules)
    for each in found:
        assert each.expected and each.found and each.step


def test_the_cause_of_a_missing_module_is_named() -> None:
    parts = Parts(**{**SOUND, **NEW_KERNEL, "in_newest_kernel": "", "headers": False})
    (found,) = findings(parts)
    assert "no headers" in found.found and K2 in found.expected and f"dkms autoinstall -k {K2}" in found.step


def test_a_version_belongs_to_its_branch_alone() -> None:
    assert is_version("580.173.02", "580") and is_version("580.173.02", "580.173.02")
    assert not is_version("580.173.02", "58") and not is_version("580.173.02", "580.17") and not is_version(None, "580")
