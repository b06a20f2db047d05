"""A driver that does not answer fails its host in words; only a host without a driver is a CPU host."""

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
def test_a_sick_driver_is_reported(programs: Programs, tmp_path: Path, name: str, check_mode: bool) -> None:  # noqa: F811
    for program in ("docker", "systemctl", "nvidia-ctk"):
        programs.put(program, "exit 1")
    programs.put("nvidia-smi", SICK)
    settings = {**MODULES[name], "host": "gpu-01"}
    result = call_module(load_module(name), tmp_path / "records", check_mode=check_mode, **settings)
    assert result["failed"] and result["msg"].startswith("The NVIDIA driver does not answer")
    assert "where:    gpu-01" in result["msg"] and "version mismatch" in result["msg"] and "next: " in result["msg"]
    assert not (tmp_path / "records").exists()


@pytest.mark.parametrize("name", MODULES)
def test_no_driver_is_no_problem(
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


@pytest.mark.parametrize(
    ("driver", "variant"),
    [("580.65.06", "cu130"), ("590.1", "cu130"), ("575.57.08", "cu126"), ("525.60.13", "cu126"), ("515.105.01", None)],
)
def test_the_driver_decides_on_the_build_of_torch(
    programs: Programs,  # noqa: F811
    tmp_path: Path,
    driver: str,
    variant: str | None,
) -> None:
    programs.put("docker", "exit 1")
    programs.put("nvidia-smi", f"echo '0, NVIDIA H100 80GB HBM3, GPU-1, 81559, {driver}, 31, 0'")
    settings = {**MODULES["kit_image"], "host": "gpu-01"}
    result = call_module(load_module("kit_image"), tmp_path / "records", check_mode=True, **settings)
    if variant is None:
        assert result["failed"] and "525" in result["msg"] and driver in result["msg"]
    else:
        assert result["variant"] == variant
