"""A driver that is there and does not answer fails its host in words; only a host without one counts as a CPU host."""

from pathlib import Path

import pytest

from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

SICK = "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18"
MODULES = {
    "acceptance": {"image": "kit", "checkpoint_folder": "/srv", "uid": 1, "gid": 1},
    "kit_image": {"source": "build", "name": "kit", "inputs": "1"},
    "nvidia_runtime": {},
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("check_mode", [False, True])
def test_a_sick_driver_is_told(programs: Programs, tmp_path: Path, name: str, check_mode: bool) -> None:  # noqa: F811
    for program in ("docker", "systemctl", "nvidia-ctk"):
        programs.put(program, "exit 1")
    programs.put("nvidia-smi", SICK)
    settings = {**MODULES[name], "host": "gpu-01"}
    result = call_module(load_module(name), tmp_path / "records", check_mode=check_mode, **settings)
    assert result["failed"] and result["msg"].startswith("The NVIDIA driver does not answer")
    assert "where:    gpu-01" in result["msg"] and "version mismatch" in result["msg"] and "next: " in result["msg"]
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", MODULES)
def test_no_driver_is_no_fault(
    programs: Programs,  # noqa: F811
    tmp_path: Path,
    name: str,
) -> None:
    for program in ("docker", "systemctl", "nvidia-ctk"):
        programs.put(program, "exit 1")
    programs.put("nvidia-smi", "exit 127")
    settings = {**MODULES[name], "host": "cpu-01"}
    result = call_module(load_module(name), tmp_path / "records", check_mode=True, **settings)
    assert not result.get("failed"), result
    assert name != "kit_image" or result["variant"] == "cpu"


def test_a_variant_that_is_named_asks_no_driver(programs: Programs, tmp_path: Path) -> None:  # noqa: F811
    programs.put("docker", "exit 1")
    programs.put("nvidia-smi", SICK)
    settings = {**MODULES["kit_image"], "host": "gpu-01", "variant": "cu126"}
    assert call_module(load_module("kit_image"), tmp_path / "records", check_mode=True, **settings)["changed"]
