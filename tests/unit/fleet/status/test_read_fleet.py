"""State of a host, computed from the readings of the host."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_run.fleet.hosts import parse_host
from mixtral_run.fleet.jobs.jobs import _engine_problem
from mixtral_run.fleet.ssh.connection import Answer
from mixtral_run.fleet.status.page import page
from mixtral_run.fleet.status.read_fleet import HostStatus, status_from

IDENTITY = {"machine_id": "0" * 32, "ssh_host_key": "ssh-ed25519 AAAA"}


def read(**more: Any) -> HostStatus:
    gpu = {"index": 0, "name": "H100", "memory_gib": 80.0, "temperature_celsius": 40.0, "ecc_errors": 0}
    found = {
        "os": {"name": "Ubuntu 24.04"}, "kernel": "6.8", "driver": {"user": "580.1", "kernel": "580.1", "error": None},
        "gpus": [gpu], "engine": {"version": "28", "error": None, "cdi_devices": [], "runtimes": []},
        "fabric_manager": {"nvswitch": True, "active": True, "version": "580.1"}, "toolkit": "1.18", "gpu_remarks": [],
        "cdi": {"gpus": 1}, "image": {"digests": [], "inputs": "ab", "id": "cd"}, "swap": [],
        "memory": {"ram_gib": 128}, "disks": [{"path": "/", "free_gib": 900}], "models": [], "checkpoints": [],
        "adapters": [], "jobs": [], "records": {"acceptance": {"stamp": {"identity": IDENTITY}, "at": "now"}},
        "identity": IDENTITY, "xid_errors": [],
    }  # fmt: skip
    return status_from(parse_host("gpu-01"), {**found, **more})


def test_a_sound_host_warns_of_nothing() -> None:
    status = read()
    assert status.warnings == () and status.reimaged is False


@pytest.mark.parametrize(
    ("reading", "warning"),
    [
        ({"xid_errors": ["NVRM: Xid (PCI:0000:3b:00): 79"]}, "1 Xid errors"),
        ({"xid_errors": None}, "Xid errors cannot be read"),
        ({"fabric_manager": {"nvswitch": True, "active": False, "version": "580.1"}}, "CUDA will fail"),
        ({"fabric_manager": {"nvswitch": True, "active": True, "version": "570.2"}}, "CUDA will fail"),
        ({"driver": {"user": "580.1", "kernel": "570.2", "error": None}}, "reboot"),
        ({"gpu_remarks": ["GPU 0: In Progress, N/A; expected Completed"]}, "GPU 0: In Progress"),
        ({"image": None}, "image is missing"),
        ({"disks": [{"path": "/", "free_gib": 1}]}, "1 GiB free"),
    ],
)
def test_each_problem_is_reported(reading: dict[str, Any], warning: str) -> None:
    (reported,) = read(**reading).warnings
    assert warning in reported


def test_a_warning_of_several_gpus_is_one_line() -> None:
    gpu = {"name": "H100", "memory_gib": 80.0, "temperature_celsius": 90.0, "ecc_errors": 0}
    gpus = [{**gpu, "index": index, "ecc_errors": int(index == 1)} for index in range(3)]
    assert read(gpus=gpus).warnings == ("GPUs 0, 1, 2 at 90 °C", "GPU 1: 1 uncorrectable ECC errors")
    remarks = ["GPU 0: In Progress", "GPU 3: In Progress", "GPU 4: Completed", "Xid 79 on GPU 5"]
    assert read(gpu_remarks=remarks).warnings == ("GPUs 0, 3: In Progress", "GPU 4: Completed", "Xid 79 on GPU 5")


def test_a_reason_that_was_cut_ends_in_dots() -> None:
    cordon = {"reason": "x" * 200, "by": "health watch", "at": "2026-01-01T00:00:00Z"}
    acceptance = {"stamp": {"identity": IDENTITY}, "at": "now"}
    (cut,) = read(records={"acceptance": acceptance, "cordon": cordon}).warnings
    assert cut.endswith("xxx …")
    (whole,) = read(records={"acceptance": acceptance, "cordon": {**cordon, "reason": "a fan"}}).warnings
    assert whole.endswith(": a fan")


def test_a_path_that_only_root_can_read_is_named_with_the_next_command() -> None:
    record, folder = "/var/lib/mixtral-run/acceptance.json", "/srv/checkpoints"
    status = read(unreadable=[record], records={"acceptance": None})
    (warning,) = status.warnings
    assert status.unreadable == (record,) and status.driver == "580.1" and status.reimaged is None
    assert record in warning and warning.endswith("next: mixtral-run bootstrap gpu-01 --ask-become-pass")
    (warning,) = read(unreadable=[folder]).warnings
    assert warning.endswith(f"next: ssh -t gpu-01 'sudo ls -ld {folder}'")


def test_what_could_not_be_read_is_not_shown_as_none() -> None:
    assert "0 / ?" in page([read(xid_errors=None)])
    assert "0 / 0" in page([read()])


@pytest.mark.parametrize("key", IDENTITY)
def test_a_stamp_of_another_installation_tells_of_a_reimage(key: str) -> None:
    assert read(identity={**IDENTITY, key: "another"}).reimaged is True


def test_a_user_who_may_not_use_the_engine_is_reported_what_helps() -> None:
    words = "ops: permission denied while trying to connect to the Docker daemon socket at unix:///var/run/docker.sock"
    reported = str(_engine_problem(parse_host("gpu-01"), Answer(3, "", words), "cannot run jobs"))
    assert "may not access the engine" in reported
    assert (
        '"docker_add_users": ["ops"]' in reported and "--ask-become-pass" in reported and "bootstrap gpu-01" in reported
    )
    down = str(
        _engine_problem(
            parse_host("ops@gpu-01"), Answer(3, "", "Cannot connect to the Docker daemon"), "cannot run jobs"
        )
    )
    assert "next:     mixtral-run bootstrap ops@gpu-01" in down


def test_rdma_devices_are_counted_by_kind() -> None:
    assert read().rdma == ""
    device = {"name": "mlx5_0", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"}
    found = read(rdma={"devices": [device, device, {**device, "rate": "25 Gb/sec", "link_layer": "Ethernet"}],
                       "gpudirect": "DMA-BUF"})  # fmt: skip
    assert found.rdma == "1 × Ethernet 25 Gb/sec, 2 × InfiniBand 400 Gb/sec (4X NDR), DMA-BUF"
    assert read(rdma={"devices": [device], "gpudirect": None}).rdma.endswith("without GPUDirect")
    with pytest.raises(ValueError, match="rdma"):
        read(rdma={"devices": 3, "gpudirect": None})
