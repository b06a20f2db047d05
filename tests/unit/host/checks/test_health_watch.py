"""The health watch of a host, with the texts that nvidia-smi, the kernel and systemd print. No GPU is asked."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.cordon import parse_cordon
from mixtral_run.fleet.explain.xid_failures import XID_NUMBERS

PROGRAM = Path(__file__).parents[4] / "roles/health/files/health_watch.py"
_spec = importlib.util.spec_from_file_location("health_watch", PROGRAM)
assert _spec is not None and _spec.loader is not None
watch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(watch)

# index, uuid, bus, temperature, ECC, recovery action, fabric state and status, PCIe width and most, clock events
SOUND = "0, GPU-a, 00000000:18:00.0, 31, 0, None, Completed, Success, 16, 16, 0x0000000000000001"
PCIE_CARD = "0, GPU-a, 00000000:18:00.0, 31, [N/A], [N/A], [N/A], [N/A], 16, 16, 0x0000000000000000"
XID = "2026-11-30T07:00:{second}+0000 gpu-01 kernel: NVRM: Xid (PCI:0000:18:00): {text}"
LINKS = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\n\t Link 0: 26.562 GB/s\n\t Link 1: {second}\n"


class Host:
    """STAND-IN for the programs of a host."""

    def __init__(self) -> None:
        self.gpus: tuple[int, str] = (0, SOUND + "\n")
        self.rows = "GPU-a, 0, 0, No, No\n"
        self.links = LINKS.format(second="26.562 GB/s")
        self.manager: tuple[int, str] = (0, "active\n")
        self.log: tuple[int, str] = (0, "2026-11-30T06:00:00+0000 gpu-01 kernel: NVRM: loading NVIDIA UNIX Open\n")
        self.unknown_fields: set[str] = set()
        self.queries: list[str] = []

    def run(self, *argv: str) -> tuple[int, str]:
        if argv[0] == "journalctl":
            return self.log
        if argv[0] == "systemctl":
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
    tree = ast.parse(PROGRAM.read_text(), feature_version=(3, 8))
    imported = {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= sys.stdlib_module_names


def test_bad_are_the_numbers_that_explain_lets_nobody_ignore() -> None:
    bad = {"xid-reset", "xid-reboot", "xid-power", "xid-memory", "xid-nvlink", "xid-support"}
    assert set(watch.BAD_XIDS) == {number for name in bad for number in XID_NUMBERS[name]}
    assert XID_NUMBERS["xid-recovery"] == (watch.RECOVERY_XID,)


def test_a_sound_host_has_no_findings() -> None:
    host = Host()
    assert host.findings() == []
    host.gpus, host.links, host.manager = (0, PCIE_CARD + "\n"), "", (3, "inactive\n")
    assert host.findings() == [], "a host without NVSwitches needs no fabric manager"


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
        ({"manager": (3, "failed\n")}, "bad", "the fabric manager is failed"),
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


class Watched:
    """A host whose timer runs the whole program, with its files in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.folder = Host(), folder
        (folder / "m").mkdir()
        look = watch.look
        monkeypatch.setattr(watch, "look", lambda: look(self.host.run))

    def tick(self, *more: str) -> dict[str, Any]:
        files = ("--record", f"{self.folder}/health.json", "--cordon-file", str(self.cordon))
        watch.main([*files, "--metrics", f"{self.folder}/m/health.prom", *(more or ["--cordon"])])
        record: dict[str, Any] = json.loads((self.folder / "health.json").read_text())
        return record

    @property
    def cordon(self) -> Path:
        return self.folder / "cordon.json"


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(tmp_path, monkeypatch)


def test_a_bad_host_is_cordoned_once_and_stays_as_its_people_leave_it(watched: Watched) -> None:
    watched.tick()
    assert not watched.cordon.exists()
    watched.host.log = (0, XID.format(second="00", text="79, GPU has fallen off the bus.") + "\n")
    watched.tick("--interval-seconds", "60")
    assert not watched.cordon.exists(), "without --cordon it only watches"
    watched.tick()
    record = parse_cordon(watched.cordon.read_text())
    assert record is not None and record.by == "health watch" and "Xid 79 on GPU 0000:18:00" in record.reason
    assert (watched.cordon.stat().st_mode & 0o777) == 0o644
    watched.cordon.unlink()
    for _ in range(2):
        (finding,) = watched.tick()["findings"]
        assert not watched.cordon.exists(), "the same event is no reason again"
        assert finding["level"] == "warn" and "before somebody uncordoned" in finding["text"]
    watched.host.log = (0, watched.host.log[1] + XID.format(second="09", text="79, GPU has fallen off the bus.") + "\n")
    watched.tick()
    assert "07:00:09" in watched.cordon.read_text() and "07:00:00" not in watched.cordon.read_text()


def test_a_state_that_returns_after_it_was_fine_is_a_reason_again(watched: Watched) -> None:
    for _ in range(2):
        watched.host.manager = (3, "failed\n")
        watched.tick()
        assert "fabric manager is failed" in watched.cordon.read_text()
        watched.cordon.unlink()
        assert watched.tick()["findings"][0]["level"] == "bad" and not watched.cordon.exists()
        watched.host.manager = (0, "active\n")
        watched.tick()


def test_somebodys_cordon_stays(watched: Watched) -> None:
    watched.cordon.write_text('{"reason": "maintenance"}')
    watched.host.manager = (3, "failed\n")
    assert watched.tick()["cordoned_for"] == []
    assert watched.cordon.read_text() == '{"reason": "maintenance"}'
    watched.cordon.unlink()
    watched.tick()
    assert "fabric manager" in watched.cordon.read_text()


def test_what_it_cannot_ask_is_no_reason(watched: Watched) -> None:
    watched.host.gpus, watched.host.log = (124, ""), (1, "")
    assert {each["level"] for each in watched.tick()["findings"]} == {"unknown"} and not watched.cordon.exists()


def test_metrics_are_in_prometheus_form(watched: Watched) -> None:
    watched.host.log = (0, XID.format(second="00", text="79, GPU has fallen off the bus.") + "\n")
    watched.host.rows = "GPU-a, 4, 1, Yes, No\n"
    watched.tick()
    lines = (watched.folder / "m/health.prom").read_text().splitlines()
    assert {
        'mixtral_run_gpu_xid_errors{gpu="0000:18:00",xid="79"} 1', "mixtral_run_host_cordoned 1",
        'mixtral_run_health_findings{level="bad"} 1', 'mixtral_run_health_findings{level="warn"} 1',
        'mixtral_run_gpu_remapped_rows{gpu="0",kind="correctable"} 4', "# TYPE mixtral_run_gpu_xid_errors gauge",
        'mixtral_run_gpu_remapped_rows{gpu="0",kind="pending"} 1', 'mixtral_run_gpu_nvlinks_inactive{gpu="0"} 0',
        'mixtral_run_gpu_recovery_needed{gpu="0",action="None"} 0', "mixtral_run_reboot_required 0",
    } <= set(lines)  # fmt: skip
    names = [line.split("{")[0].split(" ")[0] for line in lines if not line.startswith("#")]
    assert names == sorted(names, key=names.index), "the samples of a family stand together"
    assert all(line.startswith(("#", "mixtral_run_")) for line in lines)
    assert sorted(path.name for path in watched.folder.iterdir()) == ["cordon.json", "health.json", "m"]


def test_a_damaged_record_is_written_anew(watched: Watched) -> None:
    for text in ("{", "[]", '{"cordoned_for": 3}', '{"cordoned_for": [3]}'):
        (watched.folder / "health.json").write_text(text)
        assert watched.tick()["cordoned_for"] == []


def test_a_program_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "COMMAND_SECONDS", 0.2)
    assert watch.run("sleep", "5") == (124, "")
    assert watch.run("no-such-program") == (127, "")
    assert watch.run("sh", "-c", "echo words >&2; exit 3") == (3, "words\n")
