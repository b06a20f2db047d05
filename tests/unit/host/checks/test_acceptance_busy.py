"""A host is not measured beside a job, and that is said."""

import json
from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("acceptance")
REPORT = '{"accepted": true, "problems": [], "not_run": [], "figures": {}}'


@pytest.fixture
def settings(programs: Programs, tmp_path: Path) -> dict:  # noqa: F811
    """A host whose one GPU a process computes on."""
    programs.put(
        "nvidia-smi",
        'case "$1" in --query-compute-apps*) echo 4711 ;; nvlink) printf "GPU 0: H100\\n\\t Link 0: 26.5 GB/s\\n'
        '\\t Link 1: 26.5 GB/s\\n\\t Link 2: <inactive>\\n" ;; *) echo "0, H100, GPU-1, 81559, 550.1, 31, 0" ;; esac',
    )
    programs.put("docker", f'case "$1" in image) echo sha256:1 ;; run) echo \'{REPORT}\' ;; *) echo "{{}}" ;; esac')
    programs.put("nvidia-ctk", "echo version 1.18.1")
    return {
        "record_folder": tmp_path / "records", "host": "gpu-01", "image": "mixtral-run:local",
        "checkpoint_folder": str(tmp_path), "uid": 1000, "gid": 1000,
    }  # fmt: skip


@pytest.mark.parametrize("check_mode", [False, True])
def test_a_job_on_the_gpus_puts_it_off(
    programs: Programs,  # noqa: F811
    settings: dict,
    check_mode: bool,
) -> None:
    result = call_module(MODULE, **settings, check_mode=check_mode)
    assert result["deferred"] and not result["changed"] and result["reason"] == "GPU processes are running (pid 4711)"
    assert not programs.calls("docker run") and not settings["record_folder"].exists()
    assert call_module(MODULE, **settings, measure_when_busy=True, check_mode=check_mode)["changed"]
    assert bool(programs.calls("docker run")) != check_mode


def test_it_is_done_when_they_are_idle_and_not_again(programs: Programs, settings: dict) -> None:  # noqa: F811
    call_module(MODULE, **settings, measure_when_busy=True)
    record = json.loads((settings["record_folder"] / "acceptance.json").read_text())
    assert record["gpus"] == {"memory_gib": {"GPU-1": 79.6}, "nvlinks": 2} and record["stamp"]["gpus"] == ["GPU-1"]
    file = settings["record_folder"] / "acceptance.json"
    assert file.stat().st_mode & 0o777 == 0o644  # `status` reads it without root
    file.chmod(0o600)
    assert call_module(MODULE, **settings)["why"] == "unchanged since it was accepted", (
        "a job is no reason to tell more"
    )
    assert file.stat().st_mode & 0o777 == 0o644
    assert call_module(MODULE, **settings, force=True)["deferred"]
    assert len(programs.calls("docker run")) == 1


def test_the_record_of_an_older_version_is_completed_without_a_measurement(programs: Programs, settings: dict) -> None:  # noqa: F811
    call_module(MODULE, **settings, measure_when_busy=True)
    file = settings["record_folder"] / "acceptance.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in record.items() if name != "gpus"}))
    # nvidia-smi may list links and fail all the same.
    programs.put(
        "nvidia-smi",
        'case "$1" in nvlink) printf "\\t Link 0: 26.5 GB/s\\n"; exit 255 ;; '
        '*) echo "0, H100, GPU-1, 81559, 550.1, 31, 0" ;; esac',
    )
    assert not call_module(MODULE, **settings, check_mode=True)["changed"]
    assert "gpus" not in json.loads(file.read_text())
    assert not call_module(MODULE, **settings)["changed"]
    assert json.loads(file.read_text()) == {**record, "gpus": {"memory_gib": {"GPU-1": 79.6}, "nvlinks": 1}}
    assert len(programs.calls("docker run")) == 1
