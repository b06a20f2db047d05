"""Offloading of layer inputs: training is the same bit for bit, every copy is made, every buffer is reused."""

import dataclasses
import gc

import pytest
import torch

from mixtral_run.errors import TrainingError
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import Mesh, seed_everything
from mixtral_run.model.recompute.offload import Offload
from mixtral_run.train.data.samples import GlobalBatch
from mixtral_run.train.steps.cuda_graph import execution_of
from mixtral_run.train.steps.step import StepResult, train_step, trainable
from tests.multiprocess.conftest import SMALL
from tests.support.live_tensors import LiveTensors
from tests.unit.model.attention.test_packed_attention import micro_batches
from tests.unit.model.recompute.test_recompute import BATCH, SEQUENCE, loss_of, model_of

STEPS = 3


def trained(model: MixtralModel, batch: GlobalBatch) -> tuple[list[StepResult], list[torch.Tensor]]:
    """Return the results of three steps, and the adapters and their last gradients afterwards."""
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    seed_everything(3, 0)
    results = [train_step(model, optimizer, batch, 1.0) for _ in range(STEPS)]
    gradients = [each.grad for each in trainable(model) if each.grad is not None]
    return results, [each.detach() for each in trainable(model)] + gradients


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_bit_by_bit(mesh: Mesh, dropout: float, packed: bool) -> None:
    row, alone = micro_batches()
    # Rows have several sizes, so that no buffer fits the next.
    micros = (row, row) if packed else tuple(alone)
    batch = GlobalBatch(micros, 20, len(micros))
    results, tensors = trained(model_of(mesh, "offload", dropout), batch)
    assert results[0].loss != results[-1].loss
    for other in ("full", "none"):
        expected_results, expected = trained(model_of(mesh, other, dropout), batch)
        assert results == expected_results
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(tensors, expected, strict=True))


def test_every_layer_keeps_its_input_and_every_buffer_serves_again(mesh: Mesh) -> None:
    model = model_of(mesh, "offload")
    offload = model.gpt.decoder.layers[0].offload
    assert all(layer.offload is offload for layer in model.gpt.decoder.layers)
    pointers = []
    for _ in range(3):
        loss = loss_of(model)
        assert offload.num_spare == 0
        loss.backward()
        del loss
        gc.collect()
        assert offload.num_spare == SMALL.num_layers
        pointers.append({buffer.data_ptr() for buffer in offload._spare})
    assert pointers[0] == pointers[1] == pointers[2]


def test_evaluation_copies_nothing_and_a_pass_without_a_way_back_leaves_nothing(mesh: Mesh) -> None:
    model = model_of(mesh, "offload")
    offload = model.gpt.decoder.layers[0].offload
    with torch.no_grad():
        expected = loss_of(model)
    loss_of(model.eval())
    assert offload.num_spare == 0 and offload._last is None
    assert torch.equal(loss_of(model.train()).detach(), expected)
    gc.collect()
    assert offload.num_spare == SMALL.num_layers


def test_only_two_are_on_the_device(mesh: Mesh) -> None:
    offload = Offload(torch.device("cpu"))
    inputs = [torch.full((3, 5), float(number), requires_grad=True) for number in range(6)]
    saved = [offload._keep(each * 2) for each in inputs]
    assert [each._on_device is None for each in saved] == [True] * 5 + [False]
    for number in reversed(range(6)):
        given = saved[number].take()
        assert given.unique().tolist() == [2.0 * number]
        # The next pass may write to the buffer while this one still reads the tensor.
        assert given.data_ptr() != saved[number]._host.data_ptr()
        # The tensor that was taken belongs to its layer; the next one is being fetched.
        assert [index for index, each in enumerate(saved) if each._on_device is not None] == [number - 1] * (number > 0)
    # Again, as with retain_graph.
    assert saved[2].take().unique().tolist() == [4.0]


def test_the_forward_pass_leaves_only_the_last_layers_input_on_the_device(mesh: Mesh) -> None:
    """Also not the first layer's, which comes from frozen embeddings. In any case the final norm saves its own input,
    the last layer's output.
    """
    layers = 4
    model = model_of(mesh, "full", architecture=dataclasses.replace(SMALL, num_layers=layers))
    offload = model.gpt.decoder.layers[0].offload
    for mode, inputs in (("full", layers), ("offload", 1)):
        for layer in model.gpt.decoder.layers:
            layer.recompute = mode
        with LiveTensors() as live:
            loss = loss_of(model)
            hosts, saved = [], offload._last() if offload._last is not None else None
            while saved is not None:
                hosts.append(saved._host)
                saved = saved._before() if saved._before is not None else None
            left = live.besides([*model.parameters(), *hosts])
        assert len(hosts) == (layers if mode == "offload" else 0)
        # Inputs are outputs of the layer before, which adds its residual to the rows of all tokens.
        shapes = (str((SEQUENCE, BATCH, SMALL.hidden_size)), str((SEQUENCE * BATCH, SMALL.hidden_size)))
        assert len([each for each in left if each.endswith(shapes)]) == inputs + 1, (mode, left)
        loss.backward()
        del loss


def test_the_pass_is_not_captured(mesh: Mesh) -> None:
    assert not execution_of(model_of(mesh, "offload"), 16).captured


def test_host_memory_that_is_not_there_is_reported() -> None:
    with pytest.raises(TrainingError, match="--recompute offload"):
        Offload(torch.device("cpu")).buffer((2**52,), torch.float32)
