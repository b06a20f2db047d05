"""The module that brings a driver into the kernel, by the state of its parts and by what runs on the host."""

import json
import types
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

OLD, NEW = "580.95.05", "580.173.02"


class Rig:
    """The module with its readings, and a log of what it does to the kernel."""

    def __init__(self, folder: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
        self.module, self.folder, self.programs = load_module("nvidia_driver"), folder, programs
        self.parts = self.module.driver_states.Parts(
            loaded=NEW, on_disk=NEW, library=NEW, running_kernel="k1", newest_kernel="k1", fabric_manager=NEW,
            needs_fabric_manager=False, nouveau=False,
        )  # fmt: skip
        self.busy, self.after_cordon, self.error, self.why = "", "", None, {"load": "", "reload": "", "build": ""}
        self.did: list[str] = []
        for name in ("NOUVEAU", "UNATTENDED", "PERSISTENCE", "NVLINK5", "CORDON"):
            monkeypatch.setattr(self.module, name, str(folder / name.lower() / "file"))
        load, parts = self.module.driver_load, self.module.driver_parts
        monkeypatch.setattr(load, "load", lambda _: self._do("load", loaded=self.parts.on_disk))
        monkeypatch.setattr(load, "reload", lambda _: self._do("reload", loaded=self.parts.on_disk))
        monkeypatch.setattr(load, "build", lambda _: self._do("build", on_disk=self.parts.library))
        monkeypatch.setattr(parts, "parts", lambda *_: self.parts)
        monkeypatch.setattr(parts, "why_held", str)
        monkeypatch.setattr(parts, "module_field", lambda _release, _field: self.parts.on_disk)
        monkeypatch.setattr(self.module, "engine_use", types.SimpleNamespace(why_busy=self._busy))
        gpus = types.SimpleNamespace(gpus=lambda: {"error": self.error, "gpus": [], "driver": NEW})
        monkeypatch.setattr(self.module, "probe", gpus)
        programs.put("systemctl", 'case "$1" in is-active) echo active ;; is-enabled) echo enabled ;; esac')
        programs.put("update-initramfs", "exit 0")

    def _do(self, what: str, **then: str) -> str:
        self.did.append(what)
        if not self.why[what]:
            self.parts = self.parts._replace(**then)
        return self.why[what]

    def _busy(self) -> str:
        return self.after_cordon if self.cordon() else self.busy

    def cordon(self) -> dict:
        path = Path(self.module.CORDON)
        return json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, check_mode: bool = False, **params: object) -> dict:
        given = {"host": "gpu-01", "target": NEW, "board": "pcie", "unattended": ["nvidia-"], **params}
        return call_module(self.module, self.folder / "records", check_mode=check_mode, **given)


@pytest.fixture
def rig(tmp_path: Path, programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Rig:  # noqa: F811
    return Rig(tmp_path, programs, monkeypatch)


def test_the_second_run_changes_nothing(rig: Rig) -> None:
    first = rig()
    assert first["changed"] and {each["after_header"] for each in first["diff"]} >= {rig.module.NOUVEAU}
    assert 'Package-Blacklist {\n    "nvidia-";\n};' in Path(rig.module.UNATTENDED).read_text()
    assert rig.programs.calls("update-initramfs") == ["update-initramfs -u -k all"]
    assert not rig()["changed"] and len(rig.programs.calls("update-initramfs")) == 1 and rig.did == []


def test_check_mode_changes_nothing(rig: Rig) -> None:
    rig.parts = rig.parts._replace(loaded=None, on_disk="")
    assert rig(check_mode=True)["changed"]
    assert rig.did == [] and not Path(rig.module.NOUVEAU).exists() and not (rig.folder / "records").exists()


def test_absent_takes_back_what_the_record_says(rig: Rig) -> None:
    theirs = Path(rig.module.NOUVEAU)
    theirs.parent.mkdir()
    theirs.write_text("# somebody's\n")
    rig()
    assert rig(state="absent")["changed"]
    assert theirs.read_text() == "# somebody's\n" and not Path(rig.module.UNATTENDED).parent.exists()
    assert len(rig.programs.calls("update-initramfs")) == 2
    assert not rig(state="absent")["changed"]


def test_an_interrupted_renewal_of_the_initramfs_is_done_by_the_next_run(rig: Rig) -> None:
    rig.programs.put("update-initramfs", "exit 1")
    assert "initramfs cannot be renewed" in rig()["msg"]
    rig.programs.put("update-initramfs", "exit 0")
    assert "renewed the initramfs" in rig()["done"]


@pytest.mark.parametrize(
    ("parts", "did"),
    [
        ({"loaded": None}, ["load"]),
        ({"loaded": None, "on_disk": ""}, ["build", "load"]),
        ({"loaded": OLD}, ["reload"]),
        ({}, []),
    ],
)
def test_modules_are_built_loaded_and_replaced(rig: Rig, parts: dict, did: list[str]) -> None:
    rig.parts = rig.parts._replace(**parts)
    result = rig()
    assert rig.did == did and not result.get("failed") and not result["reboot"]


DUE = {"loaded": OLD}
REBOOTS = {
    # mode, busy, what the host does, words of the message or warning
    "asked for": ("ask", "", "fails", "nvidia_driver_reboot=when_idle"),
    "done": ("when_idle", "", "reboots", ""),
    "put off": ("when_idle", "2 containers running", "waits", "2 containers running"),
    "never": ("never", "", "waits", "nvidia_driver_reboot is never"),
}


@pytest.mark.parametrize("case", REBOOTS)
def test_a_reboot_that_is_due(rig: Rig, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    mode, rig.busy, end, words = REBOOTS[case]
    warnings: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _self, text: warnings.append(text))
    rig.parts = rig.parts._replace(**DUE)
    rig.why["reload"] = "the kernel does not let go of nvidia"
    result = rig(reboot=mode)
    assert bool(result.get("failed")) == (end == "fails") and bool(result.get("reboot")) == (end == "reboots")
    assert words in result.get("msg", "") + "".join(warnings)
    assert bool(rig.cordon()) == (end == "reboots")
    assert (rig.did == []) == bool(rig.busy)  # modules stay while something runs


def test_jobs_are_kept_away_while_modules_are_replaced(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []
    monkeypatch.setattr(rig.module.driver_load, "reload", lambda _: seen.append(rig.cordon()) or "")
    rig.parts = rig.parts._replace(**DUE)
    rig()
    assert seen[0]["reason"] == "the NVIDIA driver is replaced" and not rig.cordon()
    rig.after_cordon = "1 container running"
    assert "1 container running" in rig()["msg"] and len(seen) == 1 and not rig.cordon()


def test_a_job_that_starts_before_the_cordon_is_left_alone(rig: Rig) -> None:
    rig.parts, rig.after_cordon = rig.parts._replace(**DUE), "1 container running"
    result = rig(reboot="when_idle", reload=False)
    assert not result["reboot"] and not rig.cordon()


def test_no_reboot_into_a_kernel_without_the_module(rig: Rig) -> None:
    rig.parts = rig.parts._replace(**DUE, newest_kernel="k2", in_newest_kernel="")
    result = rig(reboot="when_idle", reload=False)
    assert result["failed"] and "kernel k2 has no NVIDIA module" in result["msg"] and not rig.cordon()


def test_after_the_reboot_the_host_is_uncordoned_and_somebody_elses_cordon_stays(rig: Rig) -> None:
    rig.parts = rig.parts._replace(**DUE)
    assert rig(reboot="when_idle", reload=False)["reboot"] and rig.cordon()["by"] == "mixtral-run, role nvidia_driver"
    assert "did not bring the driver" in rig(reboot="when_idle", reload=False, rebooted=True)["msg"]
    assert rig.cordon()
    rig.parts = rig.parts._replace(loaded=NEW)
    assert not rig(rebooted=True).get("failed") and not rig.cordon()
    Path(rig.module.CORDON).write_text(json.dumps({"reason": "cable", "by": "ann@desk", "at": "2026"}))
    rig(rebooted=True)
    assert rig.cordon()["by"] == "ann@desk"


@pytest.mark.parametrize(
    ("parts", "why", "error", "words"),
    [
        ({"loaded": None}, {"load": "Key was rejected by service"}, None, "Secure Boot refuses the module"),
        ({"loaded": None, "on_disk": ""}, {"build": "no headers"}, None, "linux-headers-k1"),
        ({}, {}, "No devices were found", "installed and does not work"),
        ({"needs_fabric_manager": True, "fabric_manager": OLD}, {}, None, f"fabric manager {OLD}"),
    ],
)
def test_what_does_not_work_is_reported(rig: Rig, parts: dict, why: dict, error: str | None, words: str) -> None:
    rig.parts, rig.error = rig.parts._replace(**parts), error
    rig.why.update(why)
    result = rig()
    assert result["failed"] and words in result["msg"] and "where:    gpu-01" in result["msg"]


def test_nouveau_that_stays_makes_a_reboot_due(rig: Rig) -> None:
    rig.parts = rig.parts._replace(loaded=None, nouveau=True)
    rig.why["load"] = "nouveau holds the GPUs: Module nouveau is in use"
    assert "nouveau holds the GPUs" in rig()["msg"]
    assert rig(reboot="when_idle")["reboot"]


def test_modules_of_the_next_kernel_alone_wait_for_it(rig: Rig) -> None:
    rig.parts = rig.parts._replace(loaded=None, on_disk="", newest_kernel="k2", in_newest_kernel=NEW)
    result = rig(reboot="when_idle")
    assert result["reboot"] and "kernel k2, which boots next" in result["due"] and "load" not in rig.did
