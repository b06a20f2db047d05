"""What a change of settings does to engine and containerd."""

from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

MODULE = load_module("docker_engine")


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
