"""InfiniBand and RoCE devices, read from a tree in the form of the kernel's."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.gpu import rdma

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.173.02  Release Build\n"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.173.02  Release Build\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, state, layer, vpd in (
        ("mlx5_0", "4: ACTIVE", "InfiniBand", b"x"),
        ("mlx5_1", "4: ACTIVE", "Ethernet", b"x"),
        ("mlx5_2", "1: DOWN", "InfiniBand", b"x"),
        ("mlx5_3", "4: ACTIVE", "InfiniBand", b"\x82SW_MNG\x00"),
    ):
        port = tmp_path / "sys/class/infiniband" / name / "ports/1"
        port.mkdir(parents=True)
        (port.parents[1] / "device").mkdir()
        (port.parents[1] / "device/vpd").write_bytes(vpd)
        for file, text in (("state", state), ("rate", "400 Gb/sec (4X NDR)"), ("link_layer", layer)):
            (port / file).write_text(text + "\n")
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    return tmp_path


def test_active_devices_are_listed_and_bridges_to_nvswitches_are_not(root: Path) -> None:
    assert rdma.read(str(root))["devices"] == [
        {"name": "mlx5_0", "rate": "400 Gb/sec (4X NDR)", "link_layer": "InfiniBand"},
        {"name": "mlx5_1", "rate": "400 Gb/sec (4X NDR)", "link_layer": "Ethernet"},
    ]


@pytest.mark.parametrize(
    ("module", "kernel", "peermem", "expected"),
    [
        (OPEN, "5.15.0-1050-aws", False, "DMA-BUF"),
        (OPEN, "6.8.0-51-generic", True, "DMA-BUF"),
        (OPEN, "5.12.0", False, "DMA-BUF"),
        (OPEN, "5.11.99", False, None),
        (OPEN, "4.18.0-553.el8_10.x86_64", False, None),
        (OPEN, "6.1", False, "DMA-BUF"),
        (OPEN, "5.4.0-200-generic", False, None),
        (OPEN, "5.4.0-200-generic", True, "nvidia-peermem"),
        (CLOSED, "6.8.0", False, None),
        (CLOSED, "6.8.0", True, "nvidia-peermem"),
        ("", "6.8.0", False, None),
    ],
)
def test_the_way_to_the_memory_of_the_gpus(
    root: Path, module: str, kernel: str, peermem: bool, expected: str | None
) -> None:
    (root / "proc/driver/nvidia/version").write_text(module)
    if peermem:
        (root / "sys/module/nvidia_peermem").mkdir(parents=True)
    assert rdma.read(str(root), kernel)["gpudirect"] == expected


def test_only_devices_beside_gpus_need_one() -> None:
    device = {"name": "mlx5_0", "rate": "", "link_layer": ""}
    for devices, gpus, way, count in (([device], [1], None, 1), ([device], [], None, 0), ([], [1], None, 0),
                                      ([device], [1], "DMA-BUF", 0)):  # fmt: skip
        state = {"rdma": {"devices": devices, "gpudirect": way}, "gpus": gpus}
        assert len(list(rdma.shortfall(state, {}))) == count
