"""A host that lost a part since it was accepted says so, also alone in its fleet."""

import pytest
from ansible.module_utils.mixtral_run_host.gpu import gpu_shortfalls
from ansible.module_utils.mixtral_run_host.gpu.since_acceptance import differences, hardware, has_nvlinks

IDENTITY = {"machine_id": "1", "ssh_host_key": "k"}
DAY = ", as measured on 2026-11-01"
ACCEPT = "; if intended: mixtral-run bootstrap HOST --tags acceptance -e acceptance_force=true"


def gpus(count: int, memory: float = 80.0, first: int = 0) -> list[dict]:
    return [{"index": n, "uuid": f"GPU-{n + first}", "memory_gib": memory} for n in range(count)]


def state(found: list[dict], driver: str = "580.1", nvlinks: int | None = 144, **record: object) -> dict:
    stamp = {"gpus": [gpu["uuid"] for gpu in gpus(8)], "driver": "580.1", "identity": IDENTITY}
    kept = {"stamp": stamp, "gpus": hardware(gpus(8), 144), "at": "2026-11-01T10:00:00Z", **record}
    values = {"user": driver, "error": None}
    return {"gpus": found, "driver": values, "nvlinks": nvlinks, "identity": IDENTITY, "records": {"acceptance": kept}}


def test_a_host_as_it_was_accepted_differs_in_nothing() -> None:
    assert list(differences(state(gpus(8)))) == [] and has_nvlinks(state(gpus(8)))
    # A newer driver keeps a little more of the memory for itself.
    assert list(differences(state(gpus(8, 79.5)))) == []


@pytest.mark.parametrize(
    ("changed", "expected", "found"),
    [
        (state(gpus(7), nvlinks=126), "8 GPUs", "7 GPUs, without GPU-7"),
        (state([]), "8 GPUs", "0 GPUs, without GPU-0, GPU-1 and 6 more"),
        (state(gpus(9)), "8 GPUs", "9 GPUs, with GPU-8"),
        (state(gpus(7) + gpus(1, first=9)), "GPU-7", "in its place GPU-9"),
        (state([*gpus(7), {"index": 7, "uuid": "GPU-7", "memory_gib": 40.0}]), "80 GiB", "GPU 7: 40 GiB of memory"),
        (state(gpus(2, 75.0) + gpus(6, first=2)), "80 GiB", "GPUs 0, 1: 75 GiB of memory"),
        (state(gpus(8), nvlinks=143), "144 active NVLinks", "143 active NVLinks"),
        (state(gpus(8), driver="595.2"), "driver 580.1", "driver 595.2"),
    ],
)
def test_each_lost_or_other_part_is_named(changed: dict, expected: str, found: str) -> None:
    # What the stamp of the acceptance does not hold, a bootstrap alone does not measure again.
    accept = ACCEPT if "memory" in found or "NVLink" in found else ""
    assert list(differences(changed)) == [(expected + DAY + accept, found)]


def test_status_warns_of_it() -> None:
    checks = ("next_boot", "lock", "mig", "persistence", "_fabric")
    with pytest.MonkeyPatch.context() as patch:
        for name in checks:
            patch.setattr(gpu_shortfalls, name, lambda *_: ())
        patch.setattr(gpu_shortfalls.rdma, "shortfall", lambda *_: ())
        found = gpu_shortfalls.remarks(state(gpus(7)) | {"fabric_manager": {}})
    assert found == [f"7 GPUs, without GPU-7; expected 8 GPUs{DAY}"]


def test_a_record_of_another_kit_or_host_is_not_compared() -> None:
    less = gpus(7, 40.0)
    for record in ({"stamp": None}, {"stamp": {"gpus": 8}}, {"stamp": [], "gpus": 3}):
        assert list(differences(state(less, **record))) == []
    older = state(gpus(8, 40.0), nvlinks=None, gpus=None)
    assert list(differences(older)) == [] and not has_nvlinks(older)
    assert list(differences(state(less) | {"identity": {**IDENTITY, "machine_id": "2"}})) == []
    assert list(differences(state(less) | {"records": {"acceptance": None}})) == []
    # The driver's own error is a warning already, and GPUs that it does not list are not lost.
    assert list(differences(state([]) | {"driver": {"user": None, "error": "nvidia-smi hangs"}})) == []
