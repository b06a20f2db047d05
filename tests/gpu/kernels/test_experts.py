"""The experts' fast path in bf16 compared with a reference in float64, for every kind of routing."""

import pytest
import torch

from mixtral_run.model.kernels.grouped_mm import added_linear, grouped_linear, has_grouped_product
from mixtral_run.model.kernels.swiglu import recomputing_backward, swiglu, swiglu_of, swiglu_with_adapter
from tests.support.references.experts_reference import PRODUCT_ROUTINGS, ROUTINGS, AdaptedCase, Case, reference

SCALE = 2.0


def on_gpu(case: Case) -> Case:
    values = {
        name: value.detach().to("cuda", torch.bfloat16) for name, value in vars(case).items() if name != "offsets"
    }
    return Case(**values, offsets=case.offsets.cuda())


def cast_to_bf16(case: Case) -> Case:
    """Return the inputs rounded to bf16, in float64."""
    values = {name: value.detach().bfloat16().double() for name, value in vars(case).items() if name != "offsets"}
    return Case(**values, offsets=case.offsets)


def ours(case: Case) -> torch.Tensor:
    hidden = grouped_linear(case.rows, case.first, case.offsets)
    inner = grouped_linear(case.rows, case.inner_first, case.offsets)
    active = swiglu_with_adapter(hidden, inner, case.outer_first, SCALE, case.offsets)
    return grouped_linear(active, case.second, case.offsets)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_outputs_and_gradients(routing: tuple[int, ...], rank: int) -> None:
    exact = cast_to_bf16(Case.random(routing, hidden=256, ffn=384, rank=rank, seed=sum(routing) + rank))
    fast = on_gpu(exact)
    if torch.cuda.get_device_capability() >= (8, 0) and sum(routing):
        assert has_grouped_product(fast.rows, 256, 768, rank)
    results = []
    for case, compute in ((fast, ours), (exact, lambda case: reference(case, SCALE))):
        for tensor in case.tensors():
            tensor.requires_grad_(True)
        output = compute(case)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        (output * weights.to(output)).sum().backward()
        results.append([output.detach(), *(tensor.grad for tensor in case.tensors())])
    for mine, expected in zip(*results, strict=True):
        error = (mine.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert not torch.isnan(mine).any()
        assert float(error) < 1e-2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("routing", [*ROUTINGS, (0, 1, 1, 0)])
def test_frozen_experts_without_adapters(routing: tuple[int, ...]) -> None:
    """Check outputs and the rows' gradient of a base without adapters on its experts."""
    exact = cast_to_bf16(Case.random(routing, hidden=256, ffn=384, rank=16, seed=sum(routing)))
    results = []
    for case in (on_gpu(exact), exact):
        rows = case.rows.requires_grad_(True)
        hidden = grouped_linear(rows, case.first, case.offsets)
        output = grouped_linear(swiglu(hidden, case.offsets), case.second, case.offsets)
        weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)
        (output * weights.to(output)).sum().backward()
        results.append((output.detach(), rows.grad))
    for mine, expected in zip(*results, strict=True):
        assert not torch.isnan(mine).any()
        assert float((mine.double().cpu() - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("with_probs", [False, True])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("routing", [(5, 36), (33, 32, 0, 1, 96), (700, 310, 0, 1, 420)])
def test_swiglu_recomputes_in_its_backward_pass(routing: tuple[int, ...], rank: int, with_probs: bool) -> None:
    """Experts end within tiles, and rows of no expert follow. A row whose probability is 0 gives it no gradient."""
    count, ffn = sum(routing), 384
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    hidden, inner, gradient = (torch.randn(count + 40, size, device="cuda").bfloat16() for size in (2 * ffn, rank, ffn))
    outer = torch.randn(len(routing), 2 * ffn, rank, device="cuda").bfloat16()
    probs = torch.rand(count + 40, device="cuda") if with_probs else None
    if probs is not None:
        probs[::3] = 0.0
    found = recomputing_backward(hidden, inner, outer, SCALE, offsets, gradient, probs)
    assert torch.equal(found[1][:count], swiglu_of(hidden, inner, outer, SCALE, offsets)[:count])
    owner = torch.repeat_interleave(torch.arange(len(routing)), torch.tensor(routing)).cuda()
    added = torch.einsum("tr,tor->to", inner[:count].double(), outer.double()[owner])
    whole = (hidden[:count].double() + SCALE * added).requires_grad_(True)
    gate, up = whole.chunk(2, dim=1)
    active = gate * gate.sigmoid() * up
    active.backward(gradient[:count].double())
    products = (active * gradient[:count].double()).sum(1)
    if probs is not None:
        products = torch.where(probs[:count] > 0, products / probs[:count].double(), 0.0)
    for mine, right in zip(found[:3], (whole.grad, active, products), strict=True):
        assert mine is not None
        assert right is not None
        assert float((mine[:count].double() - right).norm()) <= 4e-3 * float(right.norm())


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("width", [256, 1000, 4096])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 1, 420)])
def test_an_adapters_halves(routing: tuple[int, ...], width: int, rank: int) -> None:
    from mixtral_run.model.kernels.narrow_mm_triton import narrow_outer_product, narrow_product

    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    owner = torch.repeat_interleave(torch.arange(len(routing), device="cuda"), torch.tensor(routing, device="cuda"))
    rows, inner = (torch.randn(sum(routing), size, device="cuda").bfloat16() for size in (width, rank))
    half = torch.randn(len(routing), rank, width, device="cuda").bfloat16()
    for matrices in (half.transpose(1, 2), half.transpose(1, 2).contiguous()):
        expected = torch.einsum("tk,tkn->tn", rows.double(), matrices.double()[owner])
        assert float((narrow_product(rows, matrices, offsets) - expected).norm()) < 4e-3 * float(expected.norm())
        found = narrow_product(rows, matrices, offsets, scale=0.3)
        assert float((found - 0.3 * expected).norm()) < 4e-3 * 0.3 * float(expected.norm())
    one_hot = torch.nn.functional.one_hot(owner, len(routing)).double()
    expected = torch.einsum("te,tn,tk->enk", one_hot, inner.double(), rows.double())
    found = narrow_outer_product(rows, inner, offsets, narrow_first=True)
    assert float((found - expected).norm()) < 4e-3 * float(expected.norm())
    assert torch.equal(narrow_outer_product(rows, inner, offsets, narrow_first=False), found.transpose(1, 2))
    twice = narrow_outer_product(rows, inner, offsets, narrow_first=True, scale=2.0)
    assert torch.equal(twice, narrow_outer_product(rows, inner * 2.0, offsets, narrow_first=True))


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("scale", [2.0, 0.25, 0.3])
@pytest.mark.parametrize("routing", ROUTINGS[:-1])
def test_a_factor_of_an_outer_product(routing: tuple[int, ...], scale: float) -> None:
    """It multiplies the narrow side, bit for bit, wherever it is applied."""
    from mixtral_run.model.kernels.grouped_mm import outer_product

    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    rows, inner = (torch.randn(sum(routing), size, device="cuda").bfloat16() for size in (1000, 16))
    found = outer_product(rows, inner, offsets, dtype=torch.float32, scale=scale)
    assert torch.equal(found, outer_product(rows, inner * scale, offsets, dtype=torch.float32))


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("splits", [1, 4, 15, 16, 17, 56])
def test_sums_of_parts_in_their_order(splits: int) -> None:
    from mixtral_run.model.kernels.narrow_mm_triton import _sum

    parts = torch.randn(splits, 300, 16, device="cuda")
    offsets, found = torch.tensor([3, 290], device="cuda").int(), torch.empty(300, 16, device="cuda")
    _sum(parts, 0.5, offsets, found)
    expected = torch.zeros_like(found)
    for part in parts:
        expected[:290] += part[:290]
    assert torch.equal(found, 0.5 * expected)


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("width", [1000, 9000])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 1, 420)])
def test_both_halves_products_of_a_gradient(routing: tuple[int, ...], width: int, rank: int) -> None:
    """One read of the gradient gives the same as two; rows of no expert are zeros."""
    from mixtral_run.model.kernels.grouped_mm import outer_product, product
    from mixtral_run.model.kernels.narrow_mm_triton import both_narrow_products

    count, experts = sum(routing), len(routing)
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    gradient, inner = (torch.randn(count + 40, size, device="cuda").bfloat16() for size in (width, rank))
    half = torch.randn(experts, width, rank, device="cuda").bfloat16()
    found = both_narrow_products(gradient, half, inner, 3.0, offsets, torch.float32)
    single = (product(gradient, half, offsets), outer_product(gradient, inner, offsets, dtype=torch.float32))
    expected = tuple(3.0 * each for each in single)
    for mine, right in zip(found, expected, strict=True):
        # Each is rounded to bf16: with a single row of a number or two, by up to 4e-3 from each other.
        assert float((mine.float() - right.float()).norm()) <= 6e-3 * float(right.float().norm())
    assert not found[0][count:].any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize("width", [256, 1000])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 1, 420)])
def test_an_adapters_output_is_added(routing: tuple[int, ...], width: int, rank: int) -> None:
    """Rank 8 uses torch's product."""
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    drawn = [
        torch.randn(shape, device="cuda").bfloat16()
        for shape in ((sum(routing), width), (sum(routing), rank), (len(routing), width, rank))
    ]
    found = []
    for exact in (False, True):
        base, inner, outer = ((each.double() if exact else each.clone()).requires_grad_(True) for each in drawn)
        if exact:
            owner = torch.repeat_interleave(torch.arange(len(routing)), torch.tensor(routing)).cuda()
            output = base + 2.0 * torch.einsum("tr,tor->to", inner, outer[owner])
        else:
            output = added_linear(base, inner, outer, 2.0, offsets)
        (output * torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output).to(output)).sum().backward()
        found.append((output.detach(), base.grad, inner.grad, outer.grad))
    for mine, expected in zip(*found, strict=True):
        assert float((mine - expected).norm()) <= 1e-2 * float(expected.norm())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("rank", [16, 32])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 414)])
def test_both_layers_as_one_step(routing: tuple[int, ...], rank: int, by_token: bool) -> None:
    """Compare lora_experts.py in bf16 with the reference: outputs and all gradients, those of probs included."""
    case = AdaptedCase.random(routing, hidden=256, ffn=512, rank=rank, by_token=by_token, seed=sum(routing) + rank)
    found = case.cast_to_bf16().fast("cuda", torch.bfloat16)
    for mine, expected in zip(found, case.cast_to_bf16().exact(), strict=True):
        assert not torch.isnan(mine).any()
        assert float((mine.double().cpu() - expected).norm()) <= 1.5e-2 * float(expected.norm())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strange", [1, 40, 1000])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 414)])
def test_rows_of_no_expert_leave_no_trace(routing: tuple[int, ...], strange: int) -> None:
    case = AdaptedCase.random(routing, hidden=256, ffn=512, rank=16, by_token=False, seed=sum(routing))
    found = case.cast_to_bf16().fast("cuda", torch.bfloat16, strange)
    for mine, expected in zip(found, case.cast_to_bf16().exact(), strict=True):
        assert not torch.isnan(mine).any()
        assert float((mine.double().cpu() - expected).norm()) <= 1.5e-2 * float(expected.norm())


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("strange", [0, 40])
@pytest.mark.parametrize("routing", [*ROUTINGS[:-1], (700, 310, 0, 414)])
def test_gradients_need_no_outputs(routing: tuple[int, ...], strange: int) -> None:
    """A layer that runs again computes none, and has the same gradients bit for bit."""
    case = AdaptedCase.random(routing, hidden=256, ffn=512, rank=16, by_token=not strange, seed=torch.seed() % 2**31)
    case = case.cast_to_bf16()
    expected, found = (case.fast("cuda", torch.bfloat16, strange, unread=unread) for unread in (False, True))
    assert float(expected[0].abs().max()) > 0 == float(found[0].abs().max())
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[1:], expected[1:], strict=True))


# 66 pairs of programs: few tiles with long sums are split into pieces, many are assigned in rounds.
@pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="made for Hopper")
@pytest.mark.parametrize("width", [256, 2816, 8192])
@pytest.mark.parametrize("depth", [64, 192, 2048])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("routing", PRODUCT_ROUTINGS)
def test_our_own_product(
    routing: tuple[int, ...], transposed: bool, with_adapter: bool, depth: int, width: int
) -> None:
    """Rows after the last offset belong to no expert. Two runs are equal: pieces are summed in a fixed order."""
    from mixtral_run.model.kernels.hopper_grouped_mm import grouped_product

    count, experts, rank = sum(routing), len(routing), 16
    offsets = torch.tensor(routing, device="cuda").cumsum(0).int()
    rows, inner = (torch.randn(count + 40, size, device="cuda").bfloat16() for size in (depth, rank))
    weight, half = (
        torch.randn(experts, *((width, size) if transposed else (size, width)), device="cuda").bfloat16()
        for size in (depth, rank)
    )
    adapter = (inner, half) if with_adapter else None
    found, again = (grouped_product(rows, weight, offsets, adapter, transposed=transposed)[:count] for _ in range(2))
    assert torch.equal(found, again)

    def exact(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        matrices = (right.transpose(1, 2) if transposed else right).double().unbind(0)
        parts = left[:count].split(routing)
        return torch.cat([part.double() @ each for part, each in zip(parts, matrices, strict=True)])

    expected = exact(rows, weight) + (exact(inner, half) if with_adapter else 0)
    assert float((found - expected).norm()) <= 4e-3 * float(expected.norm())


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason="other GPUs use the path in grouped_mm.py")
def test_other_numbers_of_rows_compile_nothing_again() -> None:
    """Under EP the number of rows changes with each step; compiling again would take half a minute."""
    from triton.runtime.jit import JITFunction

    from mixtral_run.model.kernels import narrow_mm_triton, swiglu_triton

    modules = (narrow_mm_triton, swiglu_triton)
    kernels = [each for module in modules for each in vars(module).values() if isinstance(each, JITFunction)]

    def compiled_after(*routings: tuple[int, ...]) -> int:
        for routing in routings:
            AdaptedCase.random(routing, hidden=4096, ffn=512, rank=16, by_token=False, seed=1).cast_to_bf16().fast(
                "cuda", torch.bfloat16
            )
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels)

    before = compiled_after((5, 36), (200, 300), (400, 410))
    assert 0 < before == compiled_after((1, 0), (16, 16), (37, 0), (90, 3), (310, 211), (700, 333))
