"""Conditions under which GPUs read from each other, checked before any memory is shared."""

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from mixtral_run.model.dispatch import symmetric_memory as module
from mixtral_run.model.dispatch.symmetric_memory import _can_read_peers, open_symmetric_memory
from mixtral_run.model.parallel import mesh
from mixtral_run.model.parallel.mesh import Mesh
from tests.multiprocess.conftest import SMALL

GPU = torch.device("cuda", 1)
GROUP: Any = object()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Pretend four processes on a machine of four GPUs that read from each other; the group has GPUs 0 and 1."""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    return monkeypatch


def test_gpus_of_one_machine_do(machine: pytest.MonkeyPatch) -> None:
    assert _can_read_peers(GROUP, GPU)
    asked: list[Any] = []
    machine.setattr(torch.cuda, "can_device_access_peer", lambda *gpus: asked.append(gpus) or True)
    assert _can_read_peers(GROUP, GPU)
    assert asked == [(GPU, 0)]


def test_cpus_do_not(machine: pytest.MonkeyPatch) -> None:
    assert not _can_read_peers(GROUP, torch.device("cpu"))


def test_gpus_of_several_machines_do_not(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("LOCAL_WORLD_SIZE", "1")
    assert not _can_read_peers(GROUP, GPU)
    machine.delenv("LOCAL_WORLD_SIZE")
    assert not _can_read_peers(GROUP, GPU)


@pytest.mark.parametrize(
    ("rank", "ranks", "asked", "able"),
    [
        (5, [4, 5], [0], True),
        (5, [4, 5, 6, 7], [0, 2, 3], True),
        # Two machines of four GPUs: this rank is the second of the second one.
        (5, [3, 5], [], False),
        (5, [5, 8], [], False),
        (5, [1, 5], [], False),
    ],
)
def test_a_group_within_one_of_several_machines_does(
    machine: pytest.MonkeyPatch, rank: int, ranks: list[int], asked: list[int], able: bool
) -> None:
    found: list[Any] = []
    machine.setattr(dist, "get_rank", lambda: rank)
    machine.setattr(dist, "get_process_group_ranks", lambda _: ranks)
    machine.setattr(torch.cuda, "can_device_access_peer", lambda own, other: found.append(other) or own == GPU)
    assert _can_read_peers(GROUP, GPU) == able
    assert found == asked


@pytest.mark.parametrize(("others", "same"), [([7, 7], True), ([7, 8], False), ([6, 7], False)])
def test_ranks_compare_their_machines(monkeypatch: pytest.MonkeyPatch, others: list[int], same: bool) -> None:
    def all_reduce(tensor: torch.Tensor, how: Any, group: Any) -> None:
        assert how == dist.ReduceOp.MAX and group is GROUP
        for each in others:
            torch.maximum(tensor, torch.tensor([each, -each]), out=tensor)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert module._is_same_on_all(7, GROUP, torch.device("cpu")) == same
    assert 0 < module._machine_number() < 2**62 and module._machine_number() == module._machine_number()


@pytest.mark.parametrize("able", [False, True])
def test_all_ranks_compare_their_machines_also_those_that_are_not_able(machine: pytest.MonkeyPatch, able: bool) -> None:
    """A rank that left the comparison out would leave the others waiting."""
    happened: list[str] = []

    class Here:
        device, expert_group = GPU, GROUP

    machine.setattr(module, "_is_same_on_all", lambda *_: happened.append("compared"))
    machine.setattr(module, "everywhere", lambda ok, _: happened.append(str(ok)))
    machine.setattr(torch.cuda, "can_device_access_peer", lambda *_: able)
    assert open_symmetric_memory(cast(Mesh, Here()), SMALL, 16, torch.bfloat16, wanted=able) is None
    assert happened == ["compared", str(None if able else False)]


def test_gpus_that_the_driver_keeps_apart_do_not(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "can_device_access_peer", lambda *_: False)
    assert not _can_read_peers(GROUP, GPU)


def test_gpus_that_a_process_does_not_see_are_not_asked(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "device_count", lambda: 1)
    machine.setattr(dist, "get_process_group_ranks", lambda _: [0, 1, 2])
    assert not _can_read_peers(GROUP, GPU)


def test_who_turns_it_off_for_nccl_turns_it_off(machine: pytest.MonkeyPatch) -> None:
    machine.setenv("NCCL_P2P_DISABLE", "1")
    assert not _can_read_peers(GROUP, GPU)
    machine.setenv("NCCL_P2P_DISABLE", "0")
    assert _can_read_peers(GROUP, GPU)


@pytest.mark.parametrize("fails", ["here", "elsewhere"])
def test_memory_that_one_process_lacks_is_shared_by_none(
    fails: str, machine: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that fails keeps the others from the next step, in which they would wait for it."""
    asked: list[str] = []

    class Fake:
        def __init__(self, *_: object) -> None:
            pass

        def allocate(self) -> None:
            asked.append("allocate")
            if fails == "here":
                raise torch.OutOfMemoryError("CUDA out of memory\nand more")

        def share(self) -> None:
            asked.append("share")

    class Here:
        device, expert_group = GPU, GROUP

    machine.setattr(module, "SymmetricMemoryExchange", Fake)
    machine.setattr(mesh, "everywhere", lambda ok, _: ok and not (asked and fails == "elsewhere"))
    machine.setattr(module, "everywhere", lambda ok, _: ok)
    machine.setattr(module, "_is_same_on_all", lambda *_: True)
    assert open_symmetric_memory(cast(Mesh, Here()), SMALL, 16, torch.bfloat16) is None
    assert asked == ["allocate"]
    expected = ["GPUs do not read from each other, exchanges are slower: CUDA out of memory."]
    assert [record.message for record in caplog.records] == (expected if fails == "here" else [])


@pytest.mark.parametrize("tokens", [1, 7, 8, 21])
def test_the_self_test_has_a_row_for_each_expert_however_short_a_step_is(
    tokens: int, machine: pytest.MonkeyPatch
) -> None:
    """A self-test of no token would pass wherever reads from other GPUs are wrong."""
    tested: list[int] = []

    class Fake:
        rank = 0

        def __init__(self, _: object, __: object, tokens: int, ___: object) -> None:
            self.tokens = tokens

        def allocate(self) -> None: ...

        def share(self) -> None: ...

        def begin(self) -> None: ...

        def route(self, values: torch.Tensor, probs: torch.Tensor, experts: torch.Tensor, *_: object) -> None:
            assert experts.flatten().bincount(minlength=8).min() > 0
            tested.append(len(values))
            raise RuntimeError("wrong bytes")

    class Here:
        device, expert_group = torch.device("cpu"), GROUP

    machine.setattr(module, "SymmetricMemoryExchange", Fake)
    machine.setattr(module, "_can_read_peers", lambda *_: True)
    machine.setattr(module, "_is_same_on_all", lambda *_: True)
    for each in (mesh, module):
        machine.setattr(each, "everywhere", lambda ok, _: ok)
    assert open_symmetric_memory(cast(Mesh, Here()), SMALL, tokens, torch.bfloat16) is None
    assert tested == [max(8, tokens // 8 * 8)]
