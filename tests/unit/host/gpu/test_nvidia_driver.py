"""The module that brings a driver into the kernel, by the state of its parts and by what runs on the host."""

import fcntl
import json
import os
import time
import types
from pathlib import Path

import pytest
import yaml

from mixtral_run.fleet import cordon
from mixtral_run.fleet.jobs import taking
from tests.unit.host.conftest import ROOT, call_module, load_module
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
        self.cdi: str | None = None
        for name in ("NOUVEAU", "UNATTENDED", "PERSISTENCE", "NVLINK5"):
            monkeypatch.setattr(self.module, name, str(folder / name.lower() / "file"))
        load, parts, guard = self.module.driver_load, self.module.driver_parts, self.module.driver_guard
        monkeypatch.setattr(guard, "CORDON", str(folder / "cordon" / "file"))
        monkeypatch.setattr(guard, "START_LOCK", str(folder / "start.lock"))
        monkeypatch.setattr(guard, "engine_use", types.SimpleNamespace(why_busy=self._busy))
        monkeypatch.setattr(guard, "probe", types.SimpleNamespace(cdi=lambda: {"path": self.cdi}))
        monkeypatch.setattr(load, "MODULES", str(folder / "modules"))
        monkeypatch.setattr(load, "load", lambda _: self._do("load", loaded=self.parts.on_disk))
        monkeypatch.setattr(load, "reload", lambda *_: self._do("reload", loaded=self.parts.on_disk))
        monkeypatch.setattr(load, "build", lambda *_: self._do("build", on_disk=self.parts.library))
        monkeypatch.setattr(load, "why_no_fabric", str)
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
        return self.after_cordon if Path(self.module.driver_guard.CORDON).exists() else self.busy

    def cordon(self) -> dict:
        path = Path(self.module.driver_guard.CORDON)
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
    monkeypatch.setattr(rig.module.driver_load, "reload", lambda *_: seen.append(rig.cordon()) or "")
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
    assert not Path(rig.module.driver_guard.CORDON).parent.exists()
    Path(rig.module.driver_guard.CORDON).parent.mkdir()
    Path(rig.module.driver_guard.CORDON).write_text(json.dumps({"reason": "cable", "by": "ann@desk", "at": "2026"}))
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


def test_a_host_on_which_something_runs_is_not_taken_apart(rig: Rig) -> None:
    rig.programs.put("systemctl", 'case "$1" in is-active) echo active ;; is-enabled) echo disabled ;; esac')
    rig(board="nvswitch")
    files, calls = Path(rig.module.NOUVEAU).read_text(), len(rig.programs.calls())
    rig.busy = rig.after_cordon = "1 container running"
    result = rig(state="absent")
    assert result["failed"] and "1 container running" in result["msg"] and "_restart_when_busy" in result["msg"]
    assert len(rig.programs.calls()) == calls and not rig.cordon() and Path(rig.module.NOUVEAU).read_text() == files
    assert rig(state="absent", check_mode=True)["failed"]
    assert rig(state="absent", change_when_busy=True)["changed"] and not Path(rig.module.NOUVEAU).exists()
    assert "systemctl disable --no-reload nvidia-fabricmanager" in rig.programs.calls()
    assert not [call for call in rig.programs.calls() if "--now" in call or "systemctl stop" in call]


def test_an_adopted_driver_is_left_alone_also_on_a_busy_host(rig: Rig) -> None:
    rig.busy = rig.after_cordon = "1 container running"
    result = rig(state="absent")
    assert not result.get("failed") and not result["changed"] and not rig.cordon()


def test_services_of_an_idle_host_are_stopped_at_once(rig: Rig) -> None:
    rig.programs.put("systemctl", 'case "$1" in is-active) echo active ;; is-enabled) echo disabled ;; esac')
    rig(board="nvswitch")
    rig(state="absent")
    assert "systemctl disable --now nvidia-fabricmanager" in rig.programs.calls()


@pytest.mark.parametrize("what", ["reload", "reboot", "absent"])
def test_a_start_of_a_job_under_way_comes_first(rig: Rig, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """The start passed the cordon before it was there, and its container is in no list yet."""
    rig()
    guard, rig.did = rig.module.driver_guard, []
    lock, asked = Path(guard.START_LOCK), []
    lock.write_text("")
    job = lock.open()
    fcntl.flock(job, fcntl.LOCK_EX)

    def sleep(_seconds: float) -> None:
        asked.append(rig.cordon())
        rig.busy = rig.after_cordon = "1 container running"  # the engine lists it, and the start lets go of the lock
        fcntl.flock(job, fcntl.LOCK_UN)

    times = {"monotonic": time.monotonic, "strftime": time.strftime, "gmtime": time.gmtime}
    monkeypatch.setattr(guard, "time", types.SimpleNamespace(sleep=sleep, **times))
    rig.parts = rig.parts._replace(**DUE)
    result = rig(reload=what == "reload", reboot="when_idle", state="absent" if what == "absent" else "present")
    assert len(asked) == 1 and asked[0] and not rig.cordon()
    assert rig.did == [] and not result.get("reboot") and Path(rig.module.NOUVEAU).exists()


def test_a_start_that_does_not_end_puts_the_change_off(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    guard = rig.module.driver_guard
    assert guard.wait_for_starts() == ""  # nobody ever started a job
    Path(guard.START_LOCK).write_text("")
    with Path(guard.START_LOCK).open() as job:
        fcntl.flock(job, fcntl.LOCK_EX)
        assert "does not end" in guard.wait_for_starts(seconds=0)
    assert guard.wait_for_starts(seconds=0) == ""
    Path(guard.START_LOCK).unlink()
    os.mkfifo(guard.START_LOCK)
    assert "no plain file" in guard.wait_for_starts(seconds=0)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"[]", b"{", b'{"by": "ann", "reason": "I wait for mixtral-run, role nvidia_driver"}'],
)
def test_a_cordon_of_somebody_else_stays(rig: Rig, content: bytes) -> None:
    path = Path(rig.module.driver_guard.CORDON)
    path.parent.mkdir()
    path.write_bytes(content)
    assert not rig().get("failed") and path.read_bytes() == content


def test_a_demand_for_a_reboot_lasts_until_the_next_boot(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules were replaced, so that no part tells the next run that the GPUs were not reset."""
    monkeypatch.setattr(rig.module.driver_guard, "boot_id", lambda: "first")
    why = "the GPUs cannot be reset: in use"

    def reload(*_: object) -> str:
        rig.parts = rig.parts._replace(loaded=NEW)
        return why

    monkeypatch.setattr(rig.module.driver_load, "reload", reload)
    rig.parts = rig.parts._replace(**DUE)
    assert why in rig(board="nvswitch")["msg"]
    assert why in rig(board="nvswitch")["msg"]
    monkeypatch.setattr(rig.module.driver_guard, "boot_id", lambda: "second")
    assert not rig(board="nvswitch").get("failed") and not rig(board="nvswitch")["changed"]


def test_the_reboot_runs_with_the_tags_of_the_module_that_cordons_for_it() -> None:
    tasks = yaml.safe_load((ROOT / "roles/nvidia_driver/tasks/present.yml").read_text())
    names = ("Load the driver and start its services", "Reboot an idle host", "Look at the driver after the reboot")
    assert [task["tags"] for task in tasks if task["name"] in names] == [["role_configure", "role_run"]] * 3


def test_the_lock_and_the_cordon_are_those_of_the_jobs() -> None:
    guard = load_module("nvidia_driver").driver_guard
    assert (guard.START_LOCK, guard.CORDON) == (taking.LOCK_FILE, cordon.CORDON_FILE)


def test_messages_name_the_host_and_a_cordon_that_stays(rig: Rig) -> None:
    rig.parts = rig.parts._replace(**DUE)
    asked = rig(reload=False)
    assert "bootstrap gpu-01 --tags nvidia_driver -e nvidia_driver_reboot=when_idle" in asked["msg"]
    assert "cordoned" not in asked["msg"]
    assert rig(reload=False, reboot="when_idle")["reboot"]
    assert "mixtral-run uncordon gpu-01" in rig(rebooted=True, reload=False)["msg"]


def test_the_modules_of_nvlink_5_are_loaded_before_its_fabric_manager(rig: Rig) -> None:
    rig.programs.put("systemctl", 'case "$1" in is-active) echo inactive ;; is-enabled) echo enabled ;; esac')
    rig.programs.put("modprobe", f'mkdir -p "{rig.folder}/modules/$1"')
    result = rig(board="nvlink5")
    calls = rig.programs.calls()
    assert calls.index("modprobe ib_umad") < calls.index("systemctl start nvidia-fabricmanager")
    assert "loaded the kernel module mlx5_ib" in result["done"]
    rig(board="nvlink5")
    assert len(rig.programs.calls("modprobe")) == 2
    (rig.folder / "modules/ib_umad").rmdir()
    rig.programs.put("modprobe", "echo 'modprobe: FATAL: Module ib_umad not found' >&2; exit 1")
    assert "linux-modules-extra-" in rig(board="nvlink5")["msg"]


def test_a_fabric_that_is_not_trained_is_reported(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig.module.driver_load, "why_no_fabric", lambda: "GPU 0: In Progress")
    assert "GPU 0: In Progress" in rig(board="nvswitch")["msg"] and not rig(board="pcie").get("failed")


def test_containers_without_cdi_keep_their_gpus(rig: Rig) -> None:
    enabled = 'case "$1" in is-active) echo active ;; is-enabled) echo disabled ;; esac'
    rig.programs.put("systemctl", enabled)
    rig.busy = rig.after_cordon = "1 container running"
    rig()
    assert not rig.programs.calls("systemctl daemon-reload") and not rig.programs.calls("systemctl restart")
    assert rig.programs.calls("systemctl enable") == ["systemctl enable --no-reload nvidia-persistenced"]
    rig.cdi = "/etc/cdi/nvidia.yaml"
    rig()  # what had to wait is done now, though no file changes
    assert len(rig.programs.calls("systemctl daemon-reload")) == 1
    assert rig.programs.calls("systemctl restart") == ["systemctl restart nvidia-persistenced"]
    assert rig.programs.calls("systemctl enable")[-1] == "systemctl enable nvidia-persistenced"
    rig()
    assert len(rig.programs.calls("systemctl daemon-reload")) == 1
    rig.cdi = None
    assert rig(state="absent", change_when_busy=True)["changed"]
    assert len(rig.programs.calls("systemctl daemon-reload")) == 1
    assert rig.programs.calls("systemctl disable") == ["systemctl disable --no-reload nvidia-persistenced"]
