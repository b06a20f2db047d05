"""Packed rows compared with the same samples in rows of their own: losses, gradients, and arguments of the kernels."""

import pytest
import torch

from mixtral_run.model.attention.packed_attention import Packed, PackedSizes, causal_arguments
from mixtral_run.model.parallel.mesh import Mesh
from mixtral_run.train.data.samples import MicroBatch
from mixtral_run.train.steps.cuda_graph import CapturedBackward
from mixtral_run.train.steps.step import EagerBackward
from tests.multiprocess.conftest import SMALL
from tests.unit.model.recompute.test_recompute import model_of

LENGTHS = ((7, 1, 9, 3), (12, 8))


def micro_batches() -> tuple[MicroBatch, list[MicroBatch]]:
    """Return packed rows of random tokens, and the same samples in rows of their own."""
    generator = torch.Generator().manual_seed(2)
    shape = (len(LENGTHS), sum(LENGTHS[0]))
    tokens, labels = (torch.randint(0, SMALL.vocab_size, shape, generator=generator) for _ in range(2))
    mask = (torch.rand(shape, generator=generator) > 0.3).float()
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS])
    alone = []
    for number, row in enumerate(LENGTHS):
        start = 0
        for length in row:
            part = (slice(number, number + 1), slice(start, start + length))
            alone.append(MicroBatch(tokens[part], labels[part], mask[part], torch.arange(length)[None]))
            start += length
    return MicroBatch(tokens, labels, mask, positions, LENGTHS), alone


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_loss_and_gradients_are_those_of_the_samples_alone(mesh: Mesh, recompute: str) -> None:
    packed, alone = micro_batches()
    results = []
    for group in ([packed], alone):
        model = model_of(mesh, recompute)
        backward = EagerBackward(model)
        loss = sum(float(backward(micro, 20)) for micro in group)
        results.append((loss, {name: each.grad for name, each in model.named_parameters() if each.requires_grad}))
    (loss, gradients), (expected, expected_gradients) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    for name, gradient in gradients.items():
        scale = float(expected_gradients[name].abs().max())
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5 * scale)


def test_without_packing_the_samples_would_see_each_other(mesh: Mesh) -> None:
    packed, _ = micro_batches()
    backward = EagerBackward(model_of(mesh, "none"))
    open_row = MicroBatch(packed.tokens, packed.labels, packed.loss_mask, packed.position_ids)
    assert abs(float(backward(packed, 20)) - float(backward(open_row, 20))) > 1e-3


def test_the_mask_is_blocks_of_triangles() -> None:
    packed = Packed.of(LENGTHS, torch.device("cpu"))
    assert packed.boundaries.tolist() == [0, 7, 8, 17, 20, 32, 40]
    assert packed.boundaries.dtype is torch.int32 and packed.longest == 12
    mask = packed.mask()
    for row, lengths in zip(mask[:, 0], LENGTHS, strict=True):
        expected = torch.block_diag(*(torch.ones(length, length).tril() for length in lengths)).bool()
        assert torch.equal(row, expected)


def test_of_all_micro_batches_shapes_are_alike() -> None:
    most = PackedSizes(samples=5, longest=14)
    packed = Packed.of(LENGTHS, torch.device("cpu"), most)
    assert packed.boundaries.tolist() == [0, 7, 8, 17, 20, 32, 40, 40, 40, 40, 40]
    assert packed.boundaries.dtype is torch.int32 and packed.longest == 14
    assert torch.equal(packed.mask(), Packed.of(LENGTHS, torch.device("cpu")).mask())
    for few in (PackedSizes(samples=2, longest=14), PackedSizes(samples=5, longest=11)):
        with pytest.raises(ValueError, match="over PackedSizes"):
            Packed.of(LENGTHS, torch.device("cpu"), few)


@pytest.mark.parametrize(
    ("samples", "longest", "seq_length", "pay"),
    [
        (24, 512, 2048, True),
        (40, 1500, 2048, True),
        (2, 2048, 2048, True),
        (400, 8000, 8192, False),
        (600, 50, 8192, True),
    ],
)
def test_many_short_samples_beside_a_long_one_are_not_worth_shapes_that_stay(
    samples: int, longest: int, seq_length: int, pay: bool
) -> None:
    assert PackedSizes(samples, longest).pay(seq_length) == pay


def test_the_captured_pass_is_the_eager_one(mesh: Mesh) -> None:
    """The capture itself is tested on GPUs (tests/gpu/kernels/test_kernels.py)."""
    packed, _ = micro_batches()
    results = []
    for captured in (False, True):
        model = model_of(mesh, "none")
        if captured:
            backward = CapturedBackward(model, None, PackedSizes(samples=6, longest=20))
            backward._inputs = backward._inputs_of(packed, 20)
            loss = float(backward._pass(adds=False))
        else:
            loss = float(EagerBackward(model)(packed, 20))
        results.append((loss, [each.grad for each in model.parameters() if each.requires_grad]))
    (loss, gradients), (expected, expected_gradients) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradients, expected_gradients)


def test_torchs_kernel_is_called_as_it_takes_it() -> None:
    """Check shapes and arguments with the operator's fake kernel: the real one runs on GPUs only (tests/gpu)."""
    from torch._subclasses import FakeTensorMode
    from torch.nn.attention.varlen import varlen_attn

    with FakeTensorMode():
        query, key = torch.empty(40, 8, 16, dtype=torch.bfloat16), torch.empty(40, 4, 16, dtype=torch.bfloat16)
        bounds = torch.empty(7, dtype=torch.int32)
        output = varlen_attn(query, key, key, bounds, bounds, 12, 12, **causal_arguments(True))
        assert output.shape == query.shape
