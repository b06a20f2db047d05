"""Effects of changed settings on the engine and containerd."""

import json
import stat
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("docker_engine")


@pytest.fixture
def engine(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:  # noqa: F811
    """Return the programs of a host whose engine is installed, stopped and disabled; `start_engine` changes that."""
    for unit in ("docker", "containerd"):
        monkeypatch.setattr(MODULE, f"{unit.upper()}_DROP_IN", str(tmp_path / f"{unit}.service.d/mixtral-run.conf"))
    monkeypatch.setattr(MODULE.shutil, "which", lambda *_, **__: None)
    programs.put("systemctl", 'case "$1" in is-active) echo inactive ;; is-enabled) echo disabled ;; esac')
    for name in ("docker", "journalctl"):
        programs.put(name)
    programs.put("nvidia-smi", "exit 127")
    return programs


def _start_engine(programs: Programs) -> None:  # noqa: F811
    programs.put("systemctl", 'case "$1" in is-active) echo active ;; is-enabled) echo enabled ;; esac')


def _changes(programs: Programs) -> list[str]:  # noqa: F811
    """Return the calls of systemctl that change the state of a service."""
    verbs = ("enable", "start", "reload", "restart")
    return [call for call in programs.calls("systemctl") if call.split()[1] in verbs]


def test_an_engine_that_was_stopped_stays_stopped_where_only_a_reload_is_asked_for(
    engine: Programs, tmp_path: Path
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    (records / "daemon_json.json").write_text('{"due": "reload", "keys": ["runtimes"]}')
    assert not call_module(MODULE, records, reload_only=True)["changed"]
    assert _changes(engine) == []
    _start_engine(engine)
    assert call_module(MODULE, records, reload_only=True)["done"] == ["reloaded the engine's settings"]
    assert _changes(engine) == ["systemctl reload docker.service"]


@pytest.mark.parametrize("is_active", [True, False])
def test_the_engine_runs_without_the_kits_settings_once_they_are_removed(
    engine: Programs, tmp_path: Path, is_active: bool
) -> None:
    records = tmp_path / "records"
    records.mkdir()
    (records / "daemon_json.json").write_text('{"due": "reload", "keys": ["runtimes"]}')
    for unit in ("docker", "containerd"):
        (tmp_path / f"{unit}.service.d").mkdir()
        (tmp_path / f"{unit}.service.d/mixtral-run.conf").touch()
    if is_active:
        _start_engine(engine)
    assert call_module(MODULE, records, state="absent")["changed"]
    assert _changes(engine) == ["systemctl restart containerd.service docker.service"] * is_active
    assert not list(tmp_path.glob("*.service.d/*")) and not list(records.glob("*"))


def test_a_restart_for_removed_settings_waits_for_running_work(
    engine: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE.engine_use, "why_busy", lambda: "1 container running (job)")
    (tmp_path / "docker.service.d").mkdir()
    (tmp_path / "docker.service.d/mixtral-run.conf").touch()
    _start_engine(engine)
    assert call_module(MODULE, tmp_path / "records", state="absent")["deferred"]
    record = json.loads((tmp_path / "records/daemon_json.json").read_text())
    assert record == {"due": "restart", "keys": ["docker.service.d"]} and _changes(engine) == []


@pytest.mark.parametrize("due", ["reload", "restart"])
def test_an_engine_whose_packages_go_next_is_not_restarted_for_its_settings(
    engine: Programs, tmp_path: Path, due: str
) -> None:
    """A restart would start containers with --restart always, which then keep the packages."""
    records = tmp_path / "records"
    records.mkdir()
    (records / "daemon_json.json").write_text(json.dumps({"due": due, "keys": ["live-restore"]}))
    (records / "docker_engine.json").write_text('{"hook_known": true}')
    (tmp_path / "docker.service.d").mkdir()
    (tmp_path / "docker.service.d/mixtral-run.conf").touch()
    _start_engine(engine)
    result = call_module(MODULE, records, state="absent", engine_goes=True)
    assert result["done"] == [f"removed {tmp_path}/docker.service.d/mixtral-run.conf"]
    assert _changes(engine) == [] and not list(records.glob("*"))


def test_only_root_reads_the_address_of_the_proxy(engine: Programs, tmp_path: Path) -> None:
    drop_in, given = tmp_path / "docker.service.d/mixtral-run.conf", {"HTTP_PROXY": "http://me:secret@p:3128"}
    _start_engine(engine)
    call_module(MODULE, tmp_path / "records", environment=given)
    assert stat.S_IMODE(drop_in.stat().st_mode) == 0o600 and "me:secret" in drop_in.read_text()
    drop_in.chmod(0o644)
    assert call_module(MODULE, tmp_path / "records", environment=given)["done"] == [f"mode of {drop_in}"]
    assert stat.S_IMODE(drop_in.stat().st_mode) == 0o600
    assert not call_module(MODULE, tmp_path / "records", environment=given)["changed"]


@pytest.mark.parametrize(
    "values",
    [
        {"environment": {"HTTP_PROXY": "http://p:1\nExecStartPre=/tmp/x"}},
        {"environment": {"HTTP_PROXY": 'http://p:1" "LD_PRELOAD=/tmp/x'}},
        {"environment": {"NO_PROXY": "a\\"}},
        {"containerd_root": "/data\nUser=ops"},
    ],
)
def test_a_value_that_leaves_its_line_is_refused(engine: Programs, tmp_path: Path, values: dict) -> None:
    result = call_module(MODULE, tmp_path / "records", **values)
    assert result["failed"] and "no control characters" in result["msg"]
    assert not list(tmp_path.glob("*.service.d"))


@pytest.mark.parametrize("comes_back", [True, False])
def test_settings_that_the_engine_does_not_start_with_are_taken_back(
    engine: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comes_back: bool
) -> None:
    settings, drop_in = tmp_path / "daemon.json", tmp_path / "docker.service.d/mixtral-run.conf"
    settings.write_text('{"wrong": 1, "debug": true}')
    settings.chmod(0o640)
    records = tmp_path / "records"
    records.mkdir()
    before = {"docker": [{"path": ["debug"], "value": True}]}
    record = {"due": "restart", "keys": ["wrong"], "sections": {"docker": [{"path": ["wrong"], "value": 1}]}}
    record["rollback"] = {"path": str(settings), "text": '{"debug": true}', "sections": before}
    (records / "daemon_json.json").write_text(json.dumps(record))
    _start_engine(engine)
    # The engine starts only without the new settings.
    good = f"! grep -q wrong {settings} && ! test -e {drop_in}" if comes_back else "false"
    engine.put(
        "systemctl",
        f'case "$1" in is-active) echo active ;; is-enabled) echo enabled ;; restart) {good} ;; show) exit 0 ;; esac',
    )
    engine.put("journalctl", "echo 'the following directives are specified both as a flag: wrong'")
    monkeypatch.setattr(MODULE, "START_SECONDS", 0.2)
    result = call_module(MODULE, records, environment={"HTTP_PROXY": "http://p:1"})
    words = "it runs again as before" if comes_back else "it does not run with those from before either"
    assert result["failed"] and words in result["msg"] and "both as a flag: wrong" in result["msg"]
    assert settings.read_text() == '{"debug": true}' and stat.S_IMODE(settings.stat().st_mode) == 0o640
    assert not drop_in.exists()
    refused = tmp_path / "daemon.json.mixtral-run.refused"
    assert "wrong" in refused.read_text() and str(refused) in result["msg"] and ".bak" not in result["msg"]
    assert json.loads((records / "daemon_json.json").read_text()) == {"sections": before}
    assert _changes(engine)[-2:] == ["systemctl restart docker.service"] * 2


def test_an_engine_that_starts_with_its_settings_keeps_nothing_to_take_back(engine: Programs, tmp_path: Path) -> None:
    records = tmp_path / "records"
    records.mkdir()
    rollback = {"path": str(tmp_path / "daemon.json"), "text": None, "sections": {}}
    (records / "daemon_json.json").write_text(json.dumps({"due": "restart", "keys": ["x"], "rollback": rollback}))
    _start_engine(engine)
    call_module(MODULE, records, environment={"HTTP_PROXY": "http://p:1"})
    assert not [file for file in records.glob("*") if "rollback" in file.read_text()]


@pytest.mark.parametrize("state", ["active", "inactive"])
def test_containerds_folder_is_used_at_once_whether_the_engine_runs_or_not(
    programs: Programs,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
) -> None:
    for unit in ("docker", "containerd"):
        monkeypatch.setattr(MODULE, f"{unit.upper()}_DROP_IN", str(tmp_path / f"{unit}.service.d/mixtral-run.conf"))
    programs.put("systemctl", f'case "$1" in is-active) echo {state} ;; is-enabled) echo enabled ;; esac')
    for name in ("docker", "journalctl"):
        programs.put(name)
    programs.put("nvidia-smi", "exit 127")
    result = call_module(MODULE, tmp_path / "records", containerd_root="/data/containerd")
    assert result["changed"] and not result["deferred"], result
    assert programs.calls("systemctl restart") == ["systemctl restart containerd.service docker.service"]
