"""Errors that the NVIDIA driver reports in the kernel log (Xid, SXid), by the action that each needs.

Source of the actions: NVIDIA's Xid catalog, docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html.
"""

from __future__ import annotations

from collections.abc import Iterable

from mixtral_run.fleet.explain.known_failure import KnownFailure

XID_NUMBERS: dict[str, tuple[int, ...]] = {
    "xid-follow": (37, 38, 43, 44, 63, 66, 67, 92, 93, 121, 137, 141, 152, 153, 160, 161),
    "xid-program": (8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 68, 69, 70, 71, 72, 94),
    "xid-reset": (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    "xid-reboot": (79,),
    "xid-power": (54,),
    "xid-fabric-manager": (45,),
    "xid-memory": (48,),
    "xid-nvlink": (74, *range(144, 151)),
    "xid-recovery": (154,),
    "xid-support": (157,),
}
"""Numbers of the Xid errors that need the same action, by the name of the known failure."""

_DRAIN = 'mixtral-run cordon HOST --reason "Xid N"; mixtral-run jobs HOST    # no new job; wait for those that run, or stop them'
_RESET = (
    "ssh HOST sudo nvidia-smi -r -i N    # refused while a program, DCGM or its exporter holds the GPU: stop it first"
)
_BACK = "mixtral-run bootstrap HOST --tags acceptance -e acceptance_force=true && mixtral-run uncordon HOST    # measure before jobs return"
_LOG = "ssh HOST 'sudo dmesg | grep -i -E \"xid|nvrm\"'"


def xid_pattern(numbers: Iterable[int]) -> str:
    """Return the expression for these Xid numbers: `NVRM: Xid (PCI:0000:3b:00): 79, …` or `Xid 79`."""
    return rf"\bxid(?: ?\([^)\n]{{1,80}}\)[^:\n]{{0,40}})?:? {{0,2}}(?:{'|'.join(map(str, numbers))})\b"


def _failure(
    name: str, title: str, cause: str, commands: tuple[str, ...], words: tuple[str, ...] = (), more: str = ""
) -> KnownFailure:
    pattern = xid_pattern(XID_NUMBERS[name]) + (f"|{more}" if more else "")
    return KnownFailure(name, title, pattern, cause, commands, ("gpu", *words))


_KNOWN = "|".join(str(number) for numbers in XID_NUMBERS.values() for number in numbers)

XID_FAILURES: tuple[KnownFailure, ...] = (
    _failure(
        "xid-reboot",
        "A GPU has fallen off the bus (Xid 79)",
        "The GPU no longer answers on PCIe: power, temperature, its seat or the GPU itself. Only a reboot brings it back.",
        (
            _DRAIN,
            "ssh HOST sudo reboot",
            _BACK,
            "if it returns after two reboots: power off, reseat the GPU, or replace it",
        ),
        ("pcie", "hardware", "bus"),
        more=r"gpu has fallen off the bus",
    ),
    _failure(
        "xid-reset",
        "A GPU needs a reset",
        "The GPU or its firmware (GSP) is in a state that only a reset ends. After Xid 64 row remapping has failed: the GPU "
        "may have to be replaced.",
        (_DRAIN, _RESET, _BACK, "if it returns after the reset: sudo reboot; after two reboots: request a new GPU"),
        ("gsp", "reset", "hang", "hardware"),
    ),
    _failure(
        "xid-memory",
        "A GPU's memory has an uncorrectable error (Xid 48)",
        "Two bits of a word were wrong. The driver retires the memory: it remaps the row at the next reset.",
        (
            _DRAIN,
            "ssh HOST nvidia-smi --query-remapped-rows=gpu_uuid,remapped_rows.pending,remapped_rows.failure --format=csv",
            _RESET,
            "if remapped_rows.failure is yes: request a new GPU",
            _BACK,
        ),
        ("ecc", "memory", "row", "remap", "hardware"),
        more=r"uncorrectable ecc",
    ),
    _failure(
        "xid-nvlink",
        "An NVLink has failed (Xid 74, 144 to 150)",
        "A link between GPUs or to an NVSwitch is down. Jobs that use several GPUs hang or fail.",
        (
            _DRAIN,
            "ssh HOST 'nvidia-smi nvlink -s; systemctl status nvidia-fabricmanager'    # links that are inactive",
            _RESET,
            "if it returns: reboot; if it still returns, the host needs service",
            _BACK,
        ),
        ("nvlink", "nvswitch", "fabric", "hardware"),
    ),
    _failure(
        "xid-fabric-manager",
        "The driver ended the work of a program (Xid 45)",
        "Usually another error came first. Alone, on a host with NVSwitches, it follows the end of the fabric manager.",
        (
            _LOG,
            "ssh HOST 'systemctl status nvidia-fabricmanager; journalctl -u nvidia-fabricmanager -n 30'",
            "alone: drain the host, then: ssh HOST sudo systemctl restart nvidia-fabricmanager",
        ),
        ("fabric", "preempt"),
    ),
    _failure(
        "xid-power",
        "A GPU lacks power (Xid 54)",
        "The auxiliary power cable of the GPU is loose or not connected.",
        (_DRAIN, "power the host off, and check cables and seat of the GPU", _BACK),
        ("power", "cable", "hardware"),
    ),
    _failure(
        "xid-recovery",
        "The driver says which recovery a GPU needs (Xid 154)",
        "The line itself names the action: None, Reset, Reboot, Drain P2P, or Drain and Reset.",
        (_LOG, "ssh HOST nvidia-smi --query-gpu=index,gpu_recovery_action --format=csv", _DRAIN, _BACK),
        ("recovery", "reset", "reboot"),
    ),
    _failure(
        "xid-support",
        "The driver reports an error that NVIDIA wants to see (Xid 157)",
        "NVIDIA's catalog names no remedy for it.",
        (_DRAIN, "ssh HOST sudo nvidia-bug-report.sh    # attach its file to a support case"),
        ("support", "hardware"),
    ),
    _failure(
        "xid-program",
        "A program made an error on a GPU (Xid 13, 31, 94 and others)",
        "The program read or wrote where it may not, or one memory error was contained in it (94). The GPU itself goes on.",
        (
            "mixtral-run logs JOB    # its own error, if it has one; then start the job again",
            "if other programs fail on the same GPU too: mixtral-run bootstrap HOST --tags acceptance",
        ),
        ("illegal", "access", "program"),
    ),
    _failure(
        "xid-follow",
        "A GPU reports an event that needs no action by itself (Xid 43, 63, 92 and others)",
        "It accompanies another message, or is a notice: 63 says that a row will be remapped at the next reset.",
        (_LOG, "mixtral-run status HOST    # remapped rows, ECC errors and other Xid errors"),
        ("notice", "row", "remap"),
    ),
    KnownFailure(
        "sxid",
        "An NVSwitch reports an error (SXid)",
        r"\bsxid\b",
        "A line with the word Fatal means that jobs on the GPUs of the switch cannot go on. Non-fatal ones need no action.",
        (
            _DRAIN,
            "ssh HOST 'sudo dmesg | grep -i sxid; systemctl status nvidia-fabricmanager'",
            "ssh HOST sudo reboot",
            _BACK,
        ),
        ("nvswitch", "fabric", "hardware"),
    ),
    KnownFailure(
        "xid",
        "A GPU reports an error (Xid)",
        rf"\bxid(?: ?\([^)\n]{{1,80}}\)[^:\n]{{0,40}})?:? {{0,2}}(?!(?:{_KNOWN})\b)\d+",
        "The driver writes the number of the error into the kernel log. The kit knows no action for this one.",
        (_LOG, "https://docs.nvidia.com/deploy/xid-errors/    # NVIDIA's catalog of the numbers"),
        ("hardware", "gpu", "xid"),
    ),
)
