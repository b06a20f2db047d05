"""The health watch of a host, with the texts that nvidia-smi, the kernel and systemd print. No GPU is asked."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.explain.xid_failures import XID_NUMBERS

PROGRAM = Path(__file__).parents[4] / "roles/health/files/health_watch.py"
sys.path.insert(0, str(PROGRAM.parent))  # as Python does for the folder of a program
_spec = importlib.util.spec_from_file_location("health_watch", PROGRAM)
assert _spec is not None and _spec.loader is not None
watch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(watch)
sys.path.remove(str(PROGRAM.parent))

# index, uuid, bus, temperature, ECC, recovery action, fabric state and status, PCIe width and most, clock events
SOUND = "0, GPU-a, 00000000:18:00.0, 31, 0, None, Completed, Success, 16, 16, 0x0000000000000001"
PCIE_CARD = "0, GPU-a, 00000000:18:00.0, 31, [N/A], [N/A], [N/A], [N/A], 16, 16, 0x0000000000000000"
XID = "2026-11-30T07:00:{second}+0000 gpu-01 kernel: NVRM: Xid (PCI:0000:18:00): {text}"
LINKS = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\n\t Link 0: 26.562 GB/s\n\t Link 1: {second}\n"


def manager(state: str, load: str = "loaded") -> tuple[int, str]:
    """The answer of systemd about the fabric manager."""
    return 0, f"LoadState={load}\nActiveState={state}\n"


class Host:
    """STAND-IN for the programs of a host."""

    def __init__(self) -> None:
        self.gpus: tuple[int, str] = (0, SOUND + "\n")
        self.rows = "GPU-a, 0, 0, No, No\n"
        self.links = LINKS.format(second="26.562 GB/s")
        self.manager: tuple[int, str] = manager("active")
        self.log: tuple[int, str] = (0, "2026-11-30T06:00:00+0000 gpu-01 kernel: NVRM: loading NVIDIA UNIX Open\n")
        self.unknown_fields: set[str] = set()
        self.queries: list[str] = []

    def run(self, *argv: str) -> tuple[int, str]:
        if argv[0] == "journalctl":
            return self.log
        if argv[0] == "systemctl":
            assert argv[1:] == ("show", "--property=LoadState,ActiveState", "nvidia-fabricmanager")
            return self.manager
        if argv[:2] == ("nvidia-smi", "nvlink"):
            return 0, self.links
        if argv[0] == "nvidia-smi" and argv[1].startswith("--query-gpu="):
            fields = argv[1].partition("=")[2].split(",")
            self.queries.append(argv[1])
            for field in fields:
                if field in self.unknown_fields:
                    return 2, f'Field "{field}" is not a valid field to query.\n\n'
            code, text = self.gpus
            if code:
                return code, text
            kept = [watch.GPU_FIELDS.index(field) for field in fields]
            rows = [line.split(", ") for line in text.splitlines()]
            return 0, "".join(", ".join(row[each] for each in kept) + "\n" for row in rows)
        if argv[0] == "nvidia-smi":
            return 0, self.rows
        return 127, ""

    def findings(self) -> list[tuple[str, str]]:
        return [(each["level"], each["text"]) for each in watch.look(self.run)["findings"]]


def test_it_needs_nothing_but_the_standard_library() -> None:
    files = sorted(PROGRAM.parent.glob("*.py"))
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 8)))]
    imported = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    imported |= {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names | {file.stem for file in files}


def test_bad_are_the_numbers_that_explain_lets_nobody_ignore() -> None:
    bad = {"xid-reset", "xid-reboot", "xid-power", "xid-memory", "xid-nvlink", "xid-support"}
    assert set(watch.BAD_XIDS) == {number for name in bad for number in XID_NUMBERS[name]}
    assert XID_NUMBERS["xid-recovery"] == (watch.RECOVERY_XID,)


def test_a_sound_host_has_no_findings() -> None:
    host = Host()
    assert host.findings() == []
    host.gpus, host.links, host.manager = (0, PCIE_CARD + "\n"), "", manager("inactive")
    assert host.findings() == [], "a host without NVSwitches needs no fabric manager"
    host = Host()
    host.manager = manager("inactive", "not-found")
    assert host.findings() == [], "the fabric of a VM or a GB200 is managed from elsewhere"
    host.gpus = (0, SOUND.replace("None, C", "Not Supported, C").replace("31, 0", "31, nan") + "\n")
    assert host.findings() == []


@pytest.mark.parametrize("state", ["activating", "reloading", "deactivating"])
def test_a_fabric_manager_that_starts_or_ends_is_unknown(state: str) -> None:
    host = Host()
    host.manager, host.links = manager(state), LINKS.format(second="<inactive>")
    host.gpus = (0, SOUND.replace("Completed, Success", "In Progress, N/A") + "\n")
    assert {level for level, _ in host.findings()} == {"unknown"} and len(host.findings()) == 3


def test_an_unused_bridge_between_cards_is_no_reason_to_cordon() -> None:
    host = Host()
    host.gpus, host.links = (0, PCIE_CARD + "\n"), LINKS.format(second="<inactive>")
    assert host.findings() == [("warn", "GPU 0: 1 inactive NVLinks")]


def test_switches_need_a_fabric_manager(tmp_path: Path) -> None:
    (tmp_path / "0000:01:00.0").mkdir()
    findings = watch.Findings()
    gpus = [{"index": "0", "fabric.state": "[N/A]"}]
    run = Host().run
    assert watch.check_fabric(gpus, findings, run, devices=str(tmp_path)) == "bad" and not findings
    watch.check_fabric(gpus, findings, lambda *_: manager("inactive", "not-found"), devices=str(tmp_path))
    assert [(each["level"], each["text"]) for each in findings] == [("bad", "the fabric manager is not installed")]


@pytest.mark.parametrize("value", ["[Unknown Error]", "[GPU requires reset]", "[Insufficient Permissions]"])
@pytest.mark.parametrize("reading", ["31, 0", "None", "Completed", "Success", "16, 16", "0x0000000000000001"])
def test_a_value_that_cannot_be_read_is_unknown(reading: str, value: str) -> None:
    host = Host()
    host.gpus = (0, SOUND.replace(reading, reading.replace(reading.split(", ")[-1], value)) + "\n")
    ((level, text),) = host.findings()
    assert level == "unknown" and text.startswith("GPU 0: nvidia-smi cannot read") and text.endswith(value)


def test_a_line_in_another_form_is_unknown() -> None:
    host = Host()
    host.rows = "GPU-a, 0\n"
    assert host.findings() == [("unknown", "remapped rows: nvidia-smi answers: GPU-a, 0")]
    findings = watch.Findings()
    lines = "No devices were found\nUnable to read, GPU 3\n"
    assert watch.query_gpus(findings, lambda *_: (0, lines)) == []
    assert [(each["level"], each["text"]) for each in findings] == [
        ("unknown", "GPUs: nvidia-smi answers: No devices were found"),
        ("unknown", "GPUs: nvidia-smi answers: Unable to read, GPU 3"),
    ]


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        ({"gpus": SOUND.replace("None", "Reset")}, "bad", "GPU 0: its driver asks for: Reset"),
        ({"gpus": SOUND.replace("None", "Drain and Reset")}, "bad", "Drain and Reset"),
        ({"gpus": SOUND.replace("31, 0", "31, 3")}, "warn", "3 uncorrectable ECC errors"),
        ({"gpus": SOUND.replace("Completed, Success", "In Progress, N/A")}, "bad", "fabric.state In Progress"),
        ({"gpus": SOUND.replace("16, 16", "8, 16")}, "warn", "PCIe x8 of x16"),
        ({"gpus": SOUND.replace("0x0000000000000001", "0x0000000000000040")}, "warn", "slowed down by the hardware"),
        ({"rows": "GPU-a, 0, 1, Yes, No\n"}, "warn", "a row is to be remapped"),
        ({"rows": "GPU-a, 0, 8, 0, 1\n"}, "bad", "a row of its memory cannot be remapped"),
        ({"links": LINKS.format(second="<inactive>")}, "bad", "GPU 0: 1 inactive NVLinks"),
        ({"manager": manager("failed")}, "bad", "the fabric manager is failed"),
        ({"manager": manager("inactive", "masked")}, "bad", "the fabric manager is inactive"),
        ({"manager": (1, "System has not been booted with systemd")}, "unknown", "systemctl does not answer"),
        ({"manager": (124, "")}, "unknown", "systemctl does not answer"),
        ({"gpus": (124, "")}, "unknown", "nvidia-smi does not answer"),
        ({"gpus": (127, "")}, "unknown", "nvidia-smi is not installed"),
        ({"gpus": (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n")}, "unknown",
         "couldn't communicate"),
        ({"log": (1, "")}, "unknown", "the kernel log cannot be read"),
    ],
)  # fmt: skip
def test_what_each_reading_means(change: dict[str, Any], level: str, words: str) -> None:
    host = Host()
    for name, value in change.items():
        setattr(host, name, (0, value + "\n") if name == "gpus" and isinstance(value, str) else value)
    ((found, text),) = host.findings()
    assert found == level and words in text


def test_a_field_that_an_old_driver_does_not_know_is_left_out() -> None:
    host = Host()
    host.unknown_fields = {"gpu_recovery_action", "clocks_event_reasons.active"}
    host.gpus = (0, SOUND.replace("31, 0", "31, 2") + "\n")
    assert host.findings() == [("warn", "GPU 0: 2 uncorrectable ECC errors since the driver was loaded")]
    assert len(host.queries) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("79, pid=1234, GPU has fallen off the bus.", "Xid 79 on GPU 0000:18:00"),
        ("119, pid='<unknown>', name=<unknown>, Timeout after 6s of waiting for RPC response", "reset the GPU"),
        ("48, pid=1, An uncorrectable double bit error (DBE) has been detected", "Xid 48"),
        ("145, NVLINK: RLW NON_FATAL", "fabric manager"),
        ("154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", "GPU Reset Required"),
    ],
)
def test_an_xid_that_needs_an_action_is_bad(text: str, words: str) -> None:
    host = Host()
    host.log = (0, XID.format(second="00", text=text) + "\n")
    ((level, found),) = host.findings()
    assert level == "bad" and words in found and "2026-11-30T07:00:00" in found


@pytest.mark.parametrize(
    "text", ["13, pid=1, name=python, Graphics Exception", "63, Row Remapper: New row", "94, pid=1, Contained error"]
)
def test_an_xid_of_a_program_is_only_recorded(text: str) -> None:
    host = Host()
    host.log = (0, XID.format(second="00", text=text) + "\n")
    record = watch.look(host.run)
    assert record["findings"] == [] and record["xids"][0]["xid"] == int(text.split(",")[0])
    assert record["xids"][0]["gpu"] == "0000:18:00"


def test_of_recovery_actions_the_last_one_holds() -> None:
    host = Host()
    lines = ["154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
             "154, GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"]  # fmt: skip
    host.log = (0, "\n".join(XID.format(second=f"0{number}", text=line) for number, line in enumerate(lines)))
    assert host.findings() == []


def test_other_forms_of_the_kernel_log(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    host.log = (1, "")
    dmesg = ("[ 12.345678] NVRM: Xid (PCI:0000:3B:00 GPU-I:05): 62, pid=1\n"
             "[ 13.0] nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Fatal, Link 63 LTSSM Fault Up\n"
             "[ 13.1] nvidia-nvswitch0: SXid (PCI:0000:05:00.0): 20034, Non-fatal, Link 63\n"
             "[ 14.0] NVRM: GPU 0000:18:00.0: GPU has fallen off the bus.\n")  # fmt: skip
    run = host.run
    monkeypatch.setattr(host, "run", lambda *argv: (0, dmesg) if argv == ("dmesg",) else run(*argv))
    texts = [text for level, text in host.findings() if level == "bad"]
    assert [text.split(":")[0] for text in texts] == [
        "Xid 62 on GPU 0000", "fatal SXid 20034 on nvidia-nvswitch0 (PCI", "GPU 0000"
    ]  # fmt: skip


def test_ports_that_are_cabled_and_down(tmp_path: Path) -> None:
    for name, state, physical in (("mlx5_0", "4: ACTIVE", "5: LinkUp"), ("mlx5_1", "2: INIT", "5: LinkUp"),
                                  ("mlx5_2", "1: DOWN", "2: Polling")):  # fmt: skip
        port = tmp_path / name / "ports/1"
        (port / "counters").mkdir(parents=True)
        for file, text in (("state", state), ("phys_state", physical), ("counters/link_downed", "3")):
            (port / file).write_text(text + "\n")
    findings = watch.Findings()
    assert watch.infiniband(findings, str(tmp_path)) == dict.fromkeys(("mlx5_0/1", "mlx5_1/1", "mlx5_2/1"), 3.0)
    assert [each["text"] for each in findings] == ["InfiniBand port mlx5_1/1: INIT"]


def test_a_look_records_what_the_ports_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "infiniband", lambda findings: findings.add("warn", "InfiniBand port x: INIT") or {})
    assert Host().findings() == [("warn", "InfiniBand port x: INIT")]


def test_of_many_findings_bad_ones_stay() -> None:
    findings = watch.Findings()
    findings.add("bad", "first")
    for number in range(80):
        findings.add("warn" if number % 2 else "unknown", f"{number}")
    kept = findings.most_important()
    assert len(kept) == 50 and kept[0]["text"] == "first" and kept[-1]["text"] == "79"
    assert [each["text"] for each in kept if each["level"] == "warn"] == [f"{number}" for number in range(1, 80, 2)]


def test_a_program_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "COMMAND_SECONDS", 0.2)
    assert watch.run("sleep", "5") == (124, "")
    assert watch.run("no-such-program") == (127, "")
    assert watch.run("sh", "-c", "echo words >&2; exit 3") == (3, "words\n")
