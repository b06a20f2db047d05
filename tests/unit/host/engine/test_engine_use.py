"""Neither engine nor packages are touched under what runs: put off, or refused, and said."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import commands
from ansible.module_utils.mixtral_run_host.engine import engine_use

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")


@pytest.fixture
def host(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> Programs:  # noqa: F811
    """An idle host with the engine at version 1, and no shims of others."""
    programs.put("systemctl", "echo active")
    programs.put("docker")
    programs.put("nvidia-smi", "exit 9")
    programs.put("dpkg-query", "echo docker-ce 5:1 installed hold; echo runc 1 installed install")
    programs.put("dpkg")
    programs.put("apt-mark")
    programs.put("apt-get")
    monkeypatch.setattr(engine_use.glob, "glob", lambda _: [])
    return programs


def test_an_idle_host_is_not_busy(host: Programs) -> None:
    assert engine_use.why_busy() == ""
    assert host.calls("docker") == ["docker ps --format {{.Names}}"]


@pytest.mark.parametrize(
    ("program", "script", "words"),
    [
        ("docker", "echo job; echo other", "2 containers running (job, other)"),
        ("docker", "echo 'Cannot connect to the Docker daemon' >&2; exit 1", "does not say what runs in it: Cannot"),
        ("nvidia-smi", "echo 4711", "GPU processes are running (pid 4711)"),
        # Five are named.
        ("docker", "echo a b c d e f", "6 containers running (a, b, c, d, e)"),
        ("nvidia-smi", "echo 1 2 3 4 5 6", "GPU processes are running (pid 1, 2, 3, 4, 5)"),
    ],
)
def test_what_makes_a_host_busy(host: Programs, program: str, script: str, words: str) -> None:
    host.put(program, script)
    assert words in engine_use.why_busy()


def test_programs_that_fail_or_hang_are_no_processes(host: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    host.put("nvidia-smi", "echo No running processes found")
    assert engine_use.compute_pids() == []
    host.put("nvidia-smi", "echo 4711; exit 1")
    assert engine_use.compute_pids() == []
    asked: list[tuple[str, float]] = []

    def run(argv: list[str], timeout: float = 60) -> commands.Result:
        asked.append((argv[0], timeout))
        return commands.Result(commands.MISSING, "", "")

    monkeypatch.setattr(engine_use, "run", run)
    assert engine_use.why_busy() == ""
    assert asked == [("systemctl", 60), ("docker", 30), ("nvidia-smi", 30)]


@pytest.mark.parametrize("state", ["inactive", "failed", "unknown"])
def test_a_stopped_engine_is_not_asked_and_so_not_started(host: Programs, state: str) -> None:
    host.put("systemctl", f"echo {state}; exit 3")
    assert engine_use.why_busy() == "" and not host.calls("docker")


@pytest.mark.parametrize("state", ["activating", "reloading", ""])
def test_an_engine_that_may_run_and_does_not_answer_is_busy(host: Programs, state: str) -> None:
    host.put("systemctl", f"echo {state}; exit 3")
    host.put("docker", "exit 1")
    assert "does not say" in engine_use.why_busy()


def test_containers_that_outlived_the_engine_count(
    host: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "comm").write_text("containerd-shim\n")
    monkeypatch.setattr(engine_use.glob, "glob", lambda _: [str(tmp_path / "comm"), str(tmp_path / "ended")])
    host.put("systemctl", "echo inactive; exit 3")
    assert engine_use.why_busy() == "1 container running beside the engine"


def _settings(tmp_path: Path, **more: object) -> dict:
    return {"record_folder": tmp_path / "records", "section": "docker", "names": ["docker-ce"], **more}


@pytest.mark.parametrize("wanted", [{"versions": {"docker-ce": "5:2"}}, {"conflicting": ["runc"]}])
@pytest.mark.parametrize("check_mode", [False, True])
def test_a_change_of_the_engines_packages_waits_while_a_job_runs(
    host: Programs, tmp_path: Path, wanted: dict, check_mode: bool
) -> None:
    settings = _settings(tmp_path, restart_when_busy=False, **wanted)
    host.put("docker", "echo job")
    result = call_module(PACKAGES, **settings, check_mode=check_mode)
    assert result["deferred"] and not result["changed"] and "1 container running (job)" in result["reason"]
    assert not host.calls("apt-get") and not (tmp_path / "records").exists()
    assert call_module(PACKAGES, **{**settings, "restart_when_busy": True}, check_mode=check_mode)["changed"]
    host.put("docker")
    assert call_module(PACKAGES, **settings, check_mode=check_mode)["changed"]
    real = [call for call in host.calls("apt-get") if " install " in call and "--simulate" not in call]
    assert bool(real) != check_mode


def test_what_only_adds_a_package_does_not_wait(host: Programs, tmp_path: Path) -> None:
    host.put("docker", "echo job")
    settings = _settings(tmp_path, restart_when_busy=False)
    settings["names"] = ["docker-ce", "docker-buildx-plugin"]
    assert call_module(PACKAGES, **settings)["installed"] == ["docker-buildx-plugin"]


def test_the_engines_packages_are_not_removed_under_a_job(host: Programs, tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "records/packages.json").write_text('{"docker": ["docker-ce"]}')
    settings = _settings(tmp_path, restart_when_busy=False, state="absent")
    host.put("docker", "echo job")
    result = call_module(PACKAGES, **settings)
    assert result["failed"] and "found:    1 container running (job)" in result["msg"]
    assert "next:     end it and run again" in result["msg"] and not host.calls("apt-get")
    host.put("docker")
    assert call_module(PACKAGES, **settings)["removed"] == ["docker-ce"]
    assert not list((tmp_path / "records").glob("*"))
