"""What the health watch remembers of a host from look to look, when it cordons the host, and its metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.fleet.cordon import parse_cordon
from tests.unit.host.checks.test_health_watch import XID, Host, manager, watch


class Watched:
    """A host whose timer runs the whole program, with its files in a folder."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.folder = Host(), folder
        (folder / "m").mkdir()
        look = watch.look
        monkeypatch.setattr(watch, "look", lambda hung: look(self.host.run, hung))

    def tick(self, *more: str) -> dict[str, Any]:
        files = ("--record", f"{self.folder}/health.json", "--cordon-file", str(self.cordon))
        files += ("--metrics", f"{self.folder}/m/health.prom", "--settle-seconds", "0")
        watch.main([*files, *(more or ["--cordon"])])
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
        watched.host.manager = manager("failed")
        watched.tick()
        assert "fabric manager is failed" in watched.cordon.read_text()
        watched.cordon.unlink()
        assert watched.tick()["findings"][0]["level"] == "bad" and not watched.cordon.exists()
        watched.host.manager = manager("active")
        watched.tick()


def test_somebodys_cordon_stays(watched: Watched) -> None:
    watched.cordon.write_text('{"reason": "maintenance"}')
    watched.host.manager = manager("failed")
    assert watched.tick()["cordoned_for"] == []
    assert watched.cordon.read_text() == '{"reason": "maintenance"}'
    watched.cordon.unlink()
    watched.tick()
    assert "fabric manager" in watched.cordon.read_text()


def test_an_event_during_somebodys_cordon_is_no_reason_afterwards(watched: Watched) -> None:
    watched.cordon.write_text('{"reason": "maintenance"}')
    watched.host.log = (0, XID.format(second="00", text="79, GPU has fallen off the bus.") + "\n")
    assert watched.tick()["findings"][0]["level"] == "bad"
    watched.cordon.unlink()
    assert watched.tick()["findings"][0]["level"] == "warn" and not watched.cordon.exists()


def test_a_host_that_has_just_booted_is_not_cordoned(watched: Watched) -> None:
    watched.host.manager = manager("failed")
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    assert watched.tick("--cordon", "--settle-seconds", str(uptime + 300))["findings"][0]["level"] == "bad"
    assert not watched.cordon.exists()
    watched.tick("--cordon", "--settle-seconds", str(uptime))
    assert watched.cordon.exists()


def test_nothing_is_asked_while_an_earlier_nvidia_smi_hangs(tmp_path: Path) -> None:
    host = Host()
    asked = watch.look(host.run, [4242])
    assert host.queries == [] and asked["gpus"] == []
    assert ("unknown", "GPUs: nvidia-smi does not answer") in {(f["level"], f["text"]) for f in asked["findings"]}
    calls: list[str] = []

    def run(*argv: str) -> tuple[int, str]:
        calls.append(" ".join(argv[:2]).partition("=")[0])
        return (124, "") if calls[-1] == "nvidia-smi --query-remapped-rows" else host.run(*argv)

    watch.look(run)
    smi = [call for call in calls if call.startswith("nvidia-smi")]
    assert smi == ["nvidia-smi --query-gpu", "nvidia-smi --query-remapped-rows"], "one that hangs is enough"
    for pid, name in ((1, "nvidia-smi"), (2, "bash")):
        (tmp_path / f"{pid}").mkdir()
        (tmp_path / f"{pid}/comm").write_text(name + "\n")
    assert watch.still_hung([1, 2, 3, "x"], str(tmp_path)) == [1]


def test_a_hung_program_is_remembered(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HUNG", [4242])
    assert watched.tick()["hung"] == [4242]
    monkeypatch.setattr(watch, "HUNG", [])
    monkeypatch.setattr(watch, "still_hung", list)
    assert watched.tick()["hung"] == [4242] and len(watched.host.queries) == 1


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
