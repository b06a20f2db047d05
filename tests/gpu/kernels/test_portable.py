"""The portable kernels, which run on any GPU from A100 on: each next to torch, and steps next to the GPU's own set."""

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.kernels.portable_mm_triton import TILES, Tile, grouped_product, outer_product, tile_for
from mixtral_run.model.kernels.quantized.quantized_mm import quantize
from mixtral_run.model.kernels.requirements import KernelSet
from mixtral_run.model.kernels.selected import kernels_of
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.data.samples import MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of
from mixtral_run.train.steps.step import train_step, trainable
from tests.gpu.kernels.test_kernels import SEQ_LENGTH, small_model
from tests.support.references.experts_reference import ROUTINGS

UNEVEN = (245, 614, 409, 696, 491, 573, 450, 614)
TILES_HERE = sorted(
    {
        tile_for(tiles.most_rows, 1, torch.cuda.get_device_capability(), gradient=gradient)
        for tiles in TILES
        for gradient in (False, True)
    },
    key=str,
)


def exact(left: torch.Tensor, right: torch.Tensor, routing: tuple[int, ...]) -> torch.Tensor:
    """Return left [tokens, k] · right [experts, k, n] of each expert, in float64."""
    parts = left[: sum(routing)].double().split(routing)
    return torch.cat([part @ each.double() for part, each in zip(parts, right.unbind(0), strict=True)])


@pytest.mark.parametrize("tile", TILES_HERE, ids=str)
@pytest.mark.parametrize(("depth", "width", "rank"), [(512, 256, 16), (8, 1000, 0), (1000, 72, 64)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], UNEVEN, (9, 7, 5)])
def test_grouped_product(
    routing: tuple[int, ...], transposed: bool, depth: int, width: int, rank: int, tile: Tile
) -> None:
    """Rows after the last offset belong to no expert. Rows are also read through an index."""
    count, experts = sum(routing), len(routing)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    tokens = torch.randn(count + 40, depth, device="cuda").bfloat16()
    source = torch.randint(0, count + 40, (count + 9,), device="cuda")

    def drawn(size: int) -> torch.Tensor:
        shape = (experts, width, size) if transposed else (experts, size, width)
        matrices = torch.randn(shape, device="cuda").bfloat16()
        return matrices.transpose(1, 2) if transposed else matrices

    matrices, half = drawn(depth), drawn(max(rank, 16))
    for index in (None, source):
        rows = tokens if index is None else tokens[index]
        inner = torch.randn(rows.shape[0], max(rank, 16), device="cuda").bfloat16()
        adapter = (inner, half) if rank else None
        found = grouped_product(tokens, matrices, offsets, adapter, index, tile)
        expected = exact(rows, matrices, routing) + (exact(inner, half, routing) if rank else 0)
        assert float((found[:count] - expected).norm()) <= 4e-3 * float(expected.norm())


@pytest.mark.parametrize("sizes", [(256, 384), (72, 1000)])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], UNEVEN])
def test_outer_product(routing: tuple[int, ...], sizes: tuple[int, int]) -> None:
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    left, right = (torch.randn(sum(routing) + 30, size, device="cuda").bfloat16() for size in sizes)
    pairs = zip(
        left[: sum(routing)].double().split(routing), right[: sum(routing)].double().split(routing), strict=True
    )
    expected = torch.stack([first.t() @ second for first, second in pairs])
    found = outer_product(left, right, offsets)
    assert float((found - expected).norm()) <= 4e-3 * float(expected.norm())


@pytest.mark.parametrize("shape", [(3, 8, 96), (2, 100, 4096)])
def test_eight_bits_come_back_as_in_torch(shape: tuple[int, int, int]) -> None:
    from mixtral_run.model.kernels.quantized.quantized_mm_triton import expand

    values, scales = quantize(torch.randn(shape, device="cuda") * torch.rand(shape, device="cuda") ** 9)
    expected = (values.float() * scales[..., None]).bfloat16()
    assert torch.equal(expand(values, scales), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp8", "nf4"])
def test_a_captured_step_is_near_that_of_the_gpus_own_kernels(precision: str) -> None:
    """fp8 is farther away: the portable kernels do not quantize activations."""
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    found = []
    with open_mesh(config) as mesh:
        for kernels in ("portable", "auto"):
            model = small_model(mesh, "none", precision, kernels=kernels)
            assert kernels == "auto" or kernels_of(mesh.device) is KernelSet.PORTABLE
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, SEQ_LENGTH, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            with backward_of(model, 2 * SEQ_LENGTH) as backward:
                assert isinstance(backward, CapturedBackward)
                steps = [train_step(model, optimizer, next(stream), 1.0, backward) for _ in range(6)]
            found.append([(step.loss, step.grad_norm) for step in steps])
    tolerance = {"bf16": 2e-3, "fp8": 3e-2, "nf4": 2e-3}[precision]
    for mine, expected in zip(*found, strict=True):
        assert mine[0] == pytest.approx(expected[0], rel=tolerance)
        assert mine[1] == pytest.approx(expected[1], rel=20 * tolerance)
