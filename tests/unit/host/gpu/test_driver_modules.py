"""The modules that decide on a driver and on its version, on hosts whose programs are small scripts."""

from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PLAN, VERSION = load_module("nvidia_driver_plan"), load_module("nvidia_driver_version")
KEYS = {"debian12": {"file": "3bf863cc.pub", "fingerprint": "EB69"}}
REPOSITORY = "https://mirror.example/{id}{release}"


@pytest.fixture
def plan(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    release = {"id": "debian", "version": "12", "codename": "bookworm", "name": "Debian 12"}
    monkeypatch.setattr(PLAN.probe, "os_release", lambda: release)
    monkeypatch.setattr(PLAN.driver_parts, "pci_gpus", lambda: [0x2330] * 8)
    monkeypatch.setattr(PLAN.driver_parts, "library_version", lambda: None)
    monkeypatch.setattr(PLAN.driver_parts, "secure_boot", lambda: False)
    monkeypatch.setattr(PLAN, "source_texts", lambda: {"/etc/apt/sources.list": "deb http://deb bookworm main contrib"})
    programs.put("dpkg-query", "echo 'linux-image-amd64 6.1 installed install'")
    programs.put("nvidia-smi", "exit 127")

    def run(**params: object) -> dict:
        given = {"host": "gpu-01", "board": "nvswitch", "keys": KEYS, "repository": REPOSITORY, **params}
        return call_module(PLAN, tmp_path / "records", **given)

    return run


def test_a_bare_host_gets_packages_of_the_repository_whose_key_is_known(plan) -> None:
    found = plan()
    assert (found["action"], found["source"], found["wanted"], found["changed"]) == ("install", "nvidia", "580", False)
    assert (found["key_url"], found["key_fingerprint"]) == (f"{REPOSITORY}/3bf863cc.pub", "EB69")
    assert "linux-headers-amd64" in found["packages"] and "nvidia-fabricmanager" in found["versioned"]


def test_a_key_of_the_sites_own(plan) -> None:
    found = plan(key_url="https://mirror.example/key", key_fingerprint="AB12")
    assert (found["key_url"], found["key_fingerprint"]) == ("https://mirror.example/key", "AB12")


def test_a_system_without_a_known_key_is_refused(plan) -> None:
    found = plan(keys={})
    assert found["failed"] and "debian12" in found["msg"] and "nvidia_driver_repository_key_url" in found["msg"]


def test_a_driver_that_answers_is_adopted(plan, programs: Programs) -> None:  # noqa: F811
    programs.put("nvidia-smi", "echo '0, NVIDIA H100 80GB HBM3, GPU-1, 81559, 570.10.1, 31, 0'")
    found = plan()
    assert (found["action"], found["packages"], found["source"]) == ("adopt", [], "")
    assert plan(branch="570")["action"] == "adopt" and plan(branch="580")["action"] == "install"


def test_a_host_without_gpus_gets_nothing(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PLAN.driver_parts, "pci_gpus", list)
    monkeypatch.setattr(PLAN.gpu_driver, "nvswitch", lambda: None)
    assert plan(board="auto")["action"] == "none"


def test_what_cannot_be_installed_is_refused_in_words(plan) -> None:
    found = plan(source="ubuntu")
    assert found["failed"] and "where:    gpu-01" in found["msg"] and "nothing was changed" in found["msg"]


def test_a_board_whose_switches_are_not_seen_keeps_its_fabric_manager(
    plan,
    programs: Programs,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _self, text: warnings.append(text))
    monkeypatch.setattr(PLAN.gpu_driver, "nvswitch", lambda: None)
    (tmp_path / "records").mkdir()
    (tmp_path / "records/packages.json").write_text('{"nvidia_driver": ["nvidia-fabricmanager"]}')
    programs.put("dpkg-query", "echo 'nvidia-fabricmanager 580.1 installed hold'")
    assert "nvidia-fabricmanager" in plan(board="auto")["versioned"] and "nvidia_driver_board: pcie" in warnings[0]
    assert "nvidia-fabricmanager" not in plan(board="pcie")["versioned"] and len(warnings) == 1


def test_a_branch_in_another_form_is_refused_in_words(plan) -> None:
    assert "'R580'" in plan(branch="R580")["msg"] and "nothing was changed" in plan(version="580-server")["msg"]


MADISON = (
    'case "$*" in *nvidia-open*) echo "nvidia-open | 595.71.05-1ubuntu1 | mirror"',
    'echo "nvidia-open | 595.91.07-1 | mirror"; echo "nvidia-fabricmanager | 595.71.05-2 | mirror" ;; esac',
)


@pytest.fixture
def version(programs: Programs, tmp_path: Path):  # noqa: F811
    programs.put("dpkg-query")
    programs.put("apt-get")
    programs.put("apt-cache", *MADISON)

    def run(check_mode: bool = False, **params: object) -> dict:
        names = ["nvidia-open", "nvidia-fabricmanager"]
        given = {"names": names, "wanted": "595", "pinning": "nvidia-driver-pinning-", **params}
        return call_module(VERSION, tmp_path / "records", check_mode=check_mode, **given)

    return run


def test_all_packages_get_the_newest_version_that_they_share(version, programs: Programs) -> None:  # noqa: F811
    found = version()
    assert (found["version"], found["pattern"]) == ("595.71.05", "595.71.05-*")
    assert (found["pinning"], found["other_pinning"], found["refreshed"]) == (
        ["nvidia-driver-pinning-595.71.05"], [], True,
    )  # fmt: skip
    assert any("update" in call for call in programs.calls("apt-get"))


def test_what_is_installed_stays_and_only_the_kits_lock_goes(
    version,
    programs: Programs,  # noqa: F811
    tmp_path: Path,
) -> None:
    rows = (
        "nvidia-open 595.45.01-1",
        "nvidia-fabricmanager 595.45.01-2",
        "nvidia-driver-pinning-595.45.01 595.45.01-1",
    )
    programs.put("dpkg-query", *(f"echo '{row} installed hold'" for row in rows))
    found = version()
    assert (found["version"], found["refreshed"], found["other_pinning"]) == ("595.45.01", False, [])
    assert not programs.calls("apt-get")
    refused = version(wanted="595.71.05")
    assert refused["failed"] and "apt-get remove nvidia-driver-pinning-595.45.01" in refused["msg"]
    (tmp_path / "records").mkdir()
    (tmp_path / "records/packages.json").write_text('{"nvidia_driver": ["nvidia-driver-pinning-595.45.01"]}')
    found = version(wanted="595.71.05")
    assert (found["version"], found["other_pinning"]) == ("595.71.05", ["nvidia-driver-pinning-595.45.01"])


def test_a_fabric_manager_of_another_version_is_no_version_of_the_driver(version) -> None:
    found = version(wanted="595.91.07")
    assert found["failed"] and "595.91.07" in found["msg"] and "595.71.05-2" in found["msg"]


GATE = {
    # loaded, containers, programs, refcnt, reload, mode: what comes of it
    "nothing is loaded": (None, "", "", "", True, "ask", "installs"),
    "it is loaded already": ("595.71.05", "1 container running", "", "", True, "ask", "installs"),
    "an idle host": ("580.1", "", "", "", True, "ask", "installs"),
    "a container, asked": ("580.1", "1 container running", "", "", True, "ask", "fails"),
    "a container": ("580.1", "1 container running", "", "", True, "when_idle", "waits"),
    "a program": ("580.1", "", "programs hold the GPUs: python3 (10)", "", True, "never", "waits"),
    "a module in use": ("580.1", "", "", "the module nvidia_drm is in use (2 times)", True, "when_idle", "waits"),
    "only a reboot can do it, asked": ("580.1", "", "", "", False, "ask", "fails"),
    "only a reboot can do it": ("580.1", "", "", "", False, "when_idle", "installs"),
    "nothing may do it": ("580.1", "", "", "", False, "never", "waits"),
}


@pytest.mark.parametrize("case", GATE)
def test_a_version_is_not_changed_under_a_loaded_module_that_stays(
    version, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    loaded, containers, programs_, refcnt, reload, mode, end = GATE[case]
    warnings: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _self, text: warnings.append(text))
    monkeypatch.setattr(VERSION.gpu_driver, "kernel_driver", lambda: loaded)
    monkeypatch.setattr(VERSION.engine_use, "why_busy", lambda: containers)
    monkeypatch.setattr(VERSION.driver_parts, "why_held", lambda: programs_)
    in_use = {VERSION.driver_load.HELD_BY_SERVICES: refcnt, (): refcnt or "the services' modules are in use"}
    monkeypatch.setattr(VERSION.driver_load, "in_use", lambda without=(): in_use[without])
    found = version(reload=reload, reboot=mode, host="gpu-01")
    assert (bool(found.get("failed")), bool(found.get("deferred"))) == (end == "fails", end == "waits")
    if end == "fails":
        assert (
            "nothing was changed" in found["msg"]
            and "bootstrap gpu-01 --tags nvidia_driver -e nvidia_driver_reboot=when_idle" in found["msg"]
        )
    assert bool(warnings) == (end == "waits")
    if end != "installs":
        assert (containers or programs_ or refcnt or "nvidia_driver_reload") in "".join([*warnings, str(found)])
    if end == "fails":
        assert not version(reload=reload, reboot=mode, host="gpu-01", change_when_busy=True).get("failed")


def test_modules_that_stand_on_another_are_no_use_of_it(tmp_path: Path) -> None:
    def module(name: str, count: str, *standing: str) -> None:
        for folder in ("", *(f"holders/{each}" for each in standing)):
            (tmp_path / "sys/module" / name / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/module" / name / "refcnt").write_text(count + "\n")

    assert VERSION.driver_load.in_use(str(tmp_path)) == ""
    module("nvidia", "2", "nvidia_uvm", "nvidia_modeset")
    module("nvidia_uvm", "0")
    assert VERSION.driver_load.in_use(str(tmp_path)) == ""
    module("nvidia", "5", "nvidia_uvm", "nvidia_modeset")
    assert VERSION.driver_load.in_use(str(tmp_path)) == "the module nvidia is in use (3 times)"
    module("nvidia_uvm", "1")
    assert "nvidia_uvm is in use (1 times)" in VERSION.driver_load.in_use(str(tmp_path))
    # The persistence daemon and the fabric manager use these too, and are stopped for a change.
    services = VERSION.driver_load.HELD_BY_SERVICES
    assert VERSION.driver_load.in_use(str(tmp_path), services) == ""
    module("nvidia_drm", "1")
    assert "nvidia_drm" in VERSION.driver_load.in_use(str(tmp_path), services)


def test_check_mode_before_the_repository_is_known(version, programs: Programs) -> None:  # noqa: F811
    programs.put("apt-cache")
    found = version(check_mode=True)
    assert (found["pattern"], found["pinning"]) == ("595.*", []) and not programs.calls("apt-get")
