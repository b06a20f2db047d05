"""Floors of the acceptance follow the GPU model and the switches between the GPUs."""

from pathlib import Path

import pytest
import yaml
from ansible.module_utils.mixtral_run_host.gpu.gpu_floors import floors_for

DEFAULTS = yaml.safe_load((Path(__file__).parents[4] / "roles/acceptance/defaults/main.yml").read_text())
FLOORS, MODELS = DEFAULTS["acceptance_floors"], DEFAULTS["acceptance_model_floors"]
REDUCE, COPY = "all_reduce_gb_per_second", "host_to_device_gb_per_second"


@pytest.mark.parametrize(
    ("name", "nvswitch", "reduce", "copy"),
    [
        ("NVIDIA A40", False, 40, 5),
        ("NVIDIA A100-SXM4-80GB", True, 110, 10),
        ("NVIDIA A100 80GB PCIe", False, 40, 10),
        ("NVIDIA H100 80GB HBM3", True, 220, 24),
        ("NVIDIA H200", True, 210, 24),
        ("NVIDIA GH200 480GB", True, 40, 5),  # no H200, though its name contains the text
    ],
)
def test_floors_of_a_model(name: str, nvswitch: bool, reduce: float, copy: float) -> None:
    found = floors_for(FLOORS, MODELS, [name] * 8, nvswitch)
    assert (found[REDUCE], found[COPY]) == (reduce, copy) and set(found) == set(FLOORS)


def test_floors_are_raised_only_and_none_is_added() -> None:
    assert floors_for({COPY: 30}, MODELS, ["NVIDIA H100"], True) == {COPY: 30}
    assert floors_for({"num_gpus": 0}, MODELS, ["NVIDIA H100"], True) == {"num_gpus": 0}
    assert floors_for(FLOORS, {}, ["NVIDIA H100"], True) == FLOORS
    assert floors_for(FLOORS, MODELS, ["NVIDIA H100", "NVIDIA A40"], True) == FLOORS
    assert floors_for(FLOORS, MODELS, [], True) == FLOORS


def test_each_model_stays_below_what_published_checks_ask_for() -> None:
    # Azure's health checks: all_reduce over eight GPUs, and copies from the host, in GB/s.
    published = {"A100": (228, 21), "H100": (460, 48), "H200": (431, 48)}
    for model, (reduce, copy) in published.items():
        assert 0.4 * reduce < MODELS[model][REDUCE] < 0.6 * reduce
        assert 0.4 * copy < MODELS[model][COPY] < 0.6 * copy
