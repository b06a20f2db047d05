"""The copy in host memory and the shards of an adapter: what is copied, where it lies, when the optimizer waits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.megatron import ShardedTensor
from mixtral_run.train.checkpoints import adapter_shards, host_copy
from mixtral_run.train.checkpoints.adapter_shards import ParameterState

CPU = torch.device("cpu")


def frozen(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values), requires_grad=False)


class Model(torch.nn.Module):
    """STAND-IN: a trained transposed parameter of 2 × 3, one that another rank writes, and a frozen one of 20."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh = SimpleNamespace(device=CPU)
        self.turned = torch.nn.Parameter(torch.arange(6.0).view(3, 2).t())
        self.elsewhere = torch.nn.Parameter(torch.zeros(5))
        self.still = torch.nn.Parameter(torch.full((20,), 7.0), requires_grad=False)


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, torch.optim.Optimizer, Any]:
    model = Model()
    optimizer = torch.optim.AdamW([model.turned, model.elsewhere], lr=0.1)
    for each in (model.turned, model.elsewhere):
        each.grad = torch.ones_like(each)
    optimizer.step()
    shards = {
        name: SimpleNamespace(data=parameter.detach(), replica_id=0 if name != "elsewhere" else 1)
        for name, parameter in model.named_parameters()
    }
    monkeypatch.setattr(host_copy, "shards_of", lambda _, adapters: shards if adapters else {})
    monkeypatch.setattr(adapter_shards, "is_adapter", lambda name: name == "still")
    return model, optimizer, host_copy.AdapterCopy(model, optimizer)  # type: ignore[arg-type]


def test_the_copy_holds_what_this_rank_writes(copied: Any) -> None:
    """24 bytes of values and of two moments in blocks of 64, and 80 bytes without moments in two blocks."""
    model, optimizer, copy = copied
    assert copy.num_bytes == 3 * 64 + 128
    copy.allocate()
    copy.attach()
    turned, still = copy.states
    assert (turned.name, still.name) == ("turned", "still")
    assert still.moments == {} and set(turned.moments) == {"exp_avg", "exp_avg_sq"}
    copy.begin()
    copy.finish()
    expected = [model.turned.detach().clone(), *(optimizer.state[model.turned][each] for each in turned.moments)]
    for found, original in zip(turned.tensors, expected, strict=True):
        assert torch.equal(found, original) and found.stride() == model.turned.stride() == (1, 2)
    assert torch.equal(still.value, model.still)
    starts = [each.data_ptr() - turned.value.data_ptr() for each in (*turned.tensors, still.value)]
    assert starts == [0, 64, 128, 192]
    # What training changes now is not in it.
    with torch.no_grad():
        model.turned.add_(1.0)
    assert torch.equal(turned.value, expected[0])


def test_a_shard_belongs_to_the_parameter_that_it_lies_in() -> None:
    """Three parameters of 4, 2 and 4 numbers follow each other in memory. The shard is one number."""
    memory = torch.zeros(10)
    states = [
        ParameterState(name, memory[start:end], memory[start:end], {})
        for name, start, end in (("a", 0, 4), ("b", 4, 6), ("c", 6, 10))
    ]
    owners = [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    for at, owner in enumerate(owners):
        part = memory[at : at + 1]
        found = adapter_shards._state_and_offset(part, states)
        assert found == (states[owner], at - (0, 4, 6)[owner])
        holding = [host_copy._holds_any(each, [SimpleNamespace(data=part)]) for each in states]
        assert holding == [number == owner for number in range(3)]
    assert adapter_shards._state_and_offset(torch.zeros(1), states) is None
    assert adapter_shards._state_and_offset(memory[1:2], states[1:]) is None
    assert not host_copy._holds_any(states[0], [])


def shard_of(key: str, data: torch.Tensor) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, data)


def test_shards_have_the_data_of_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a parameter lies where it did in a copy that begins elsewhere; moments are under keys of their own."""
    parameter, memory = torch.arange(8.0).view(4, 2), torch.arange(100.0, 200.0)
    value, moment = memory[10:18].view(4, 2), memory[30:38].view(4, 2)
    shards = {"x": shard_of("key", parameter[1:3]), "of another": shard_of("other", torch.zeros(2))}
    monkeypatch.setattr(adapter_shards, "shards_of", lambda _, adapters: shards if adapters else {})
    states = [ParameterState("x", parameter, value, {"exp_avg": moment})]
    found = adapter_shards.adapter_shards(MagicMock(), states)
    assert {name: (each.key, each.data.tolist()) for name, each in found.items()} == {
        "x": ("key", [[112.0, 113.0], [114.0, 115.0]]),
        "optimizer.exp_avg.x": ("optimizer.exp_avg.key", [[132.0, 133.0], [134.0, 135.0]]),
    }


@pytest.mark.parametrize("adapters", [True, False])
def test_weights_of_the_base_that_are_trained_are_parts_of_both(adapters: bool) -> None:
    names = ("layers.0.linear_qkv.adapter.linear_in.weight", "layers.0.router.weight", "layers.0.linear_qkv.weight")
    everything: dict[str, Any] = {name: shard_of(name, torch.zeros(1)) for name in names} | {"extra": object()}
    model = MagicMock()
    model.gpt.sharded_state_dict.return_value = everything
    model.settings.lora = LoraSettings(2, 2.0, 0.0, ("linear_qkv",), train_also=("router",))
    assert set(adapter_shards.shards_of(model, adapters=adapters)) == set(names[:2] if adapters else names[1:])


def test_states_are_those_of_the_optimizer_and_then_frozen_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    monkeypatch.setattr(adapter_shards, "is_adapter", lambda name: name in ("still", "turned"))
    optimizer = torch.optim.AdamW([{"params": [model.elsewhere]}, {"params": [model.turned]}], lr=0.1)
    states = adapter_shards.live_states(model, optimizer)  # type: ignore[arg-type]
    assert [(each.name, each.moments) for each in states] == [("elsewhere", {}), ("turned", {}), ("still", {})]
    model.turned.grad = torch.ones_like(model.turned)
    optimizer.step()
    _, turned, _ = adapter_shards.live_states(model, optimizer)  # type: ignore[arg-type]
    assert turned.parameter is model.turned and turned.value.data_ptr() == model.turned.data_ptr()
    assert [each.data_ptr() for each in turned.moments.values()] == [
        optimizer.state[model.turned][name].data_ptr() for name in ("exp_avg", "exp_avg_sq")
    ]


@pytest.mark.parametrize(
    ("ranks", "fits"),
    [
        # Host, bytes that are needed, free bytes: four fifths of the least may be used.
        ([("a", 80, 100)], True),
        ([("a", 81, 100)], False),
        ([("a", 40, 100), ("a", 40, 101)], True),
        ([("a", 40, 101), ("a", 41, 100)], False),
        ([("a", 41, 100), ("a", 40, 101)], False),
        ([("a", 80, 100), ("b", 80, 100)], True),
        ([("a", 80, 100), ("b", 81, 100)], False),
        ([("a", 81, 100), ("b", 1, 100)], False),
        ([("a", 10**9, 0)], True),
    ],
)
def test_the_copies_of_a_host_together_fit(
    monkeypatch: pytest.MonkeyPatch, ranks: Sequence[tuple[str, int, int]], fits: bool
) -> None:
    def gather(into: list[Any], own: Any) -> None:
        assert own == ("gpu-01 boot", 33, 44) and len(into) == 5
        into[:] = ranks

    monkeypatch.setattr(host_copy.os, "uname", lambda: SimpleNamespace(nodename="gpu-01"))
    monkeypatch.setattr(host_copy, "boot_id", lambda: "boot")
    monkeypatch.setattr(host_copy, "available_bytes", lambda: 44)
    monkeypatch.setattr(host_copy.dist, "get_world_size", lambda: 5)
    monkeypatch.setattr(host_copy.dist, "all_gather_object", gather)
    assert host_copy.fits_on_hosts(33) is fits


def test_memory_that_cannot_be_pinned_is_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int, int]] = []
    codes = [0, -1, 2, 2]

    def register(*given: int) -> int:
        asked.append(given)
        return codes.pop(0)

    cleared: list[int] = []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(host_copy, "_clear_cuda_error", lambda: cleared.append(len(asked)))
    host_copy._warn_unpinned.cache_clear()
    memory = torch.zeros(5)
    host_copy.pin(torch.zeros(0))
    for _ in range(4):
        host_copy.pin(memory)
    assert asked == [(memory.data_ptr(), 20, 0)] * 4 and cleared == [2, 3, 4]
    said = " ".join(capsys.readouterr().err.split())
    assert [said.count(f"(CUDA error {code})") for code in (0, -1, 2)] == [0, 1, 1]
    host_copy._warn_unpinned.cache_clear()


class OnGpu(host_copy.HostCopy):
    """A copy of originals that are given, on a device that is played."""

    def __init__(self, optimizer: Any, pairs: list[tuple[Any, Any]]) -> None:
        super().__init__(SimpleNamespace(type="cuda"), optimizer, 0)  # type: ignore[arg-type]
        self.pairs = pairs

    def allocate(self) -> None:
        self._buffer(torch.Size([3]), torch.int16)

    def _pairs(self) -> Any:
        yield from self.pairs


def test_on_a_gpu_the_optimizer_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Originals on the GPU are copied as soon as they are complete there, those in host memory once they are back."""
    cuda, optimizer, pinned, events = MagicMock(), MagicMock(), [], MagicMock()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(host_copy, "pin", pinned.append)
    ready, copied = MagicMock(), cuda.Event.return_value
    cuda.current_stream.return_value.record_event.return_value = ready
    on_gpu, on_host = (MagicMock(), MagicMock(is_cuda=True)), (MagicMock(), MagicMock(is_cuda=False))
    for name, mock in (("gpu", on_gpu[0]), ("host", on_host[0]), ("ready", ready), ("copied", copied)):
        events.attach_mock(mock, name)
    stream = cuda.Stream.return_value
    events.attach_mock(stream, "stream")
    copy = OnGpu(optimizer, [(on_host[1], on_host[0]), (on_gpu[1], on_gpu[0])])
    copy.allocate()
    assert pinned == [] and copy._buffers[0].tolist() == [0, 0, 0] and copy._buffers[0].dtype == torch.int16
    copy.attach()
    assert pinned == copy._buffers
    (hook,) = optimizer.register_step_pre_hook.call_args.args
    hook(None, (), {})  # before the first save nothing is waited for
    copy.finish()
    assert not stream.wait_event.called
    copy.begin()
    assert not copy._launched.is_set() and not on_gpu[0].copy_.called
    copy.finish()
    assert copy._launched.is_set()
    called = [name for name, _, _ in events.mock_calls]
    assert called == [
        "stream.wait_event", "gpu.copy_", "ready.synchronize", "host.copy_", "copied.record", "copied.synchronize"
    ]  # fmt: skip
    stream.wait_event.assert_called_once_with(ready)
    on_gpu[0].copy_.assert_called_once_with(on_gpu[1], non_blocking=True)
    hook()
    cuda.current_stream.return_value.wait_event.assert_called_with(copied)
    # A copy that fails must not hold the optimizer for ever, and is not repeated.
    copy.begin()
    stream.wait_event.side_effect = RuntimeError("no")
    with pytest.raises(RuntimeError, match="no"):
        copy.finish()
    assert copy._launched.is_set()
    copy.finish()
    # Without originals in host memory nothing waits here for those on the GPU.
    stream.wait_event.side_effect = None
    copy.pairs = copy.pairs[1:]
    ready.reset_mock()
    copy.begin()
    copy.finish()
    assert not ready.synchronize.called
