"""Kernels of passes of generation over one more token, beside float64 and beside the kernels for many tokens."""

import pytest
import torch

from mixtral_run.model.attention.cached_attention import cached_attention, plain_cached_attention
from mixtral_run.model.attention.rotary import Rotary
from mixtral_run.model.dispatch.permute import sort_by_expert
from mixtral_run.model.kernels.decoding import cached_attention_triton, one_token_triton
from mixtral_run.model.kernels.decoding.few_tokens import (
    are_few,
    is_one,
    outputs_of_one,
    plain_outputs_of_one,
    plain_product_of_one,
    product_of_one,
    quantized_outputs_of_one,
    route,
    sorted_rows,
    takes_quantized,
)
from mixtral_run.model.kernels.decoding.halves import Halves
from mixtral_run.model.kernels.quantized.quantized_mm import dequantize, quantize_to
from mixtral_run.model.routing.moe import choose

DEVICE = torch.device("cuda")


def near(found: torch.Tensor, exact: torch.Tensor, error: float = 5e-3) -> None:
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm()) <= error * float(exact.norm())


def drawn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=DEVICE) * scale).bfloat16()


@pytest.mark.parametrize("angles_of_each", [False, True])
@pytest.mark.parametrize(
    ("shape", "length", "place", "padding"),
    [
        ((1, 8, 4, 128), 640, 600, (0,)),
        ((3, 2, 4, 64), 130, 70, (0, 65, 70)),
        ((2, 2, 1, 32), 70, 64, (3, 0)),
        ((2, 2, 6, 16), 70, 0, (0, 0)),
        ((1, 1, 4, 256), 300, 255, (200,)),
        ((2, 8, 4, 128), 9000, 8191, (5000, 0)),
    ],
)
def test_cached_attention(
    shape: tuple[int, int, int, int], length: int, place: int, padding: tuple[int, ...], angles_of_each: bool
) -> None:
    """Rows whose padding fills whole parts of the cache; what lies behind the token is never read."""
    batch, groups, heads, size = shape
    mixed, keys, values = drawn(1, batch, groups, heads + 2, size), *(drawn(batch, groups, length, size) for _ in "kv")
    index = torch.arange(length, device=DEVICE)
    begins = torch.tensor(padding, device=DEVICE)
    positions = (place - begins)[:, None] if angles_of_each else torch.tensor([[place]], device=DEVICE)
    angles = Rotary(size, 1e6, DEVICE).inputs(positions, torch.bfloat16)
    mask = ((index <= place) & (index >= begins[:, None]))[:, None, None]
    keys[:, :, place + 1 :] = values[:, :, place + 1 :] = float("nan")
    mine = (keys.clone(), values.clone())
    exact = [each[:, :, : place + 1].double() for each in (keys, values)]
    where = torch.tensor([place], device=DEVICE)
    result = cached_attention(mixed, *angles, *mine, where, mask)
    wide = (each.double() for each in (mixed, *angles))
    near(result, plain_cached_attention(*wide, *exact, where, mask[..., : place + 1]), 1e-2)
    for found, before, expected in zip(mine, (keys, values), exact, strict=True):
        near(found[:, :, place], expected[:, :, place])
        others = index != place
        assert torch.equal(found[:, :, others].nan_to_num(7.0), before[:, :, others].nan_to_num(7.0))


def test_long_caches_are_attended_to_in_few_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_attention_triton, "MOST_PARTS", 2)
    test_cached_attention((2, 1, 4, 32), 500, 270, (130, 0), angles_of_each=True)


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(1, 8, 2), (5, 6, 3), (32, 8, 2), (7, 64, 4)])
@pytest.mark.parametrize("hidden", [192, 4096])
def test_route(tokens: int, experts: int, topk: int, hidden: int) -> None:
    states, weight = drawn(tokens, hidden), drawn(experts, hidden, scale=0.02)
    probs, chosen = route(states, weight, topk)
    exact, expected = choose((states.double() @ weight.double().t()).cpu(), topk)
    # Numbers so near each other that fp32 sums may turn their order are not drawn at this precision.
    assert torch.equal(chosen.cpu(), expected)
    torch.testing.assert_close(probs.cpu().double(), exact, rtol=1e-4, atol=1e-5)


def test_tokens_that_are_no_numbers_choose_experts_that_exist() -> None:
    probs, chosen = route(torch.full((3, 512), float("nan"), device=DEVICE).bfloat16(), drawn(6, 512), 2)
    assert probs.isnan().all()
    assert bool(((chosen >= 0) & (chosen < 6)).all())


@pytest.mark.parametrize(("tokens", "count", "topk"), [(1, 8, 2), (5, 6, 3), (32, 8, 2), (32, 5, 1)])
def test_sorted_rows(tokens: int, count: int, topk: int) -> None:
    states = drawn(tokens, 1088)
    experts = torch.rand(tokens, count, device=DEVICE).topk(topk).indices
    experts[experts == 1] = 0  # one that nobody chose
    rows, *found = sorted_rows(states, experts, count)
    *expected, source = (each.to(DEVICE) for each in sort_by_expert(experts.cpu().flatten(), count, topk))
    assert all(torch.equal(mine, right) for mine, right in zip(found, expected, strict=True))
    assert torch.equal(rows, states[source])


def halves(adapted: str, count: int, outputs: int, inputs: int) -> Halves | None:
    """Adapters of a rank that is no power of two, with parts as large as the matrices'."""
    if adapted == "none":
        return None
    number, rank = (1, 16) if adapted == "shared" else (count, 6)
    return Halves(drawn(number, rank, inputs, scale=0.02), drawn(number, outputs, rank, scale=0.5), 2.0)


def exact_halves(given: Halves | None) -> Halves | None:
    return None if given is None else Halves(given.linear_in.double(), given.linear_out.double(), given.scale)


ADAPTED = ("none", "each", "shared")


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize(("hidden", "ffn", "topk"), [(512, 1024, 2), (192, 832, 3), (4096, 14336, 2)])
def test_outputs_of_one(hidden: int, ffn: int, topk: int, adapted: str) -> None:
    token = drawn(1, hidden)
    adapters = halves(adapted, 4, 2 * ffn, hidden), halves(adapted, 4, hidden, ffn)
    first, second = drawn(4, 2 * ffn, hidden, scale=0.02), drawn(4, hidden, ffn, scale=0.02)
    experts = torch.randperm(4, device=DEVICE)[None, :topk]
    probs = torch.rand(1, topk, device=DEVICE)
    exact = plain_outputs_of_one(
        token.double(), experts, probs.double(), first.double(), second.double(), tuple(map(exact_halves, adapters))
    )
    near(outputs_of_one(token, experts, probs, first, second, adapters), exact)


@pytest.mark.parametrize("adapted", ADAPTED)
@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@pytest.mark.parametrize(("hidden", "ffn", "topk"), [(512, 1024, 2), (192, 832, 3), (4096, 14336, 2)])
def test_quantized_outputs_of_one(
    hidden: int, ffn: int, topk: int, precision: str, as_bytes: bool, adapted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As float8, and as on a GPU that has no float8."""
    if as_bytes:
        monkeypatch.setattr(one_token_triton, "NATIVE_FLOAT8", (99, 0))
    token = drawn(1, hidden)
    stored = []
    for shape in ((2 * ffn, hidden), (hidden, ffn)):
        each = [quantize_to(drawn(*shape, scale=0.02), precision) for _ in range(4)]
        stored.append((torch.stack([values for values, _ in each]), torch.stack([scales for _, scales in each])))
    experts = torch.randperm(4, device=DEVICE)[None, :topk]
    probs = torch.rand(1, topk, device=DEVICE)
    adapters = halves(adapted, 4, 2 * ffn, hidden), halves(adapted, 4, hidden, ffn)
    whole = [dequantize(*(part.cpu() for part in both), torch.float32).to(DEVICE).double() for both in stored]
    exact = plain_outputs_of_one(token.double(), experts, probs.double(), *whole, tuple(map(exact_halves, adapters)))
    with torch.inference_mode():
        assert all(takes_quantized(token, values) for values, _ in stored)
    near(quantized_outputs_of_one(token, experts, probs, *stored, adapters), exact)


@pytest.mark.parametrize("adapted", ["none", "shared"])
@pytest.mark.parametrize(("width", "outputs"), [(512, 1024), (192, 72), (4096, 6144)])
def test_product_of_one(width: int, outputs: int, adapted: str) -> None:
    row, weight, adapter = drawn(1, 1, width), drawn(outputs, width, scale=0.02), halves(adapted, 1, outputs, width)
    near(
        product_of_one(row, weight, adapter),
        plain_product_of_one(row.double(), weight.double(), exact_halves(adapter)),
    )


def test_only_few_tokens_in_inference_mode_go_this_way() -> None:
    weight = drawn(64, 512)
    with torch.inference_mode():
        assert are_few(drawn(32, 512), weight) and is_one(drawn(1, 1, 512), weight)
        assert not are_few(drawn(33, 512), weight)
        assert not is_one(drawn(2, 512), weight)
        assert not is_one(drawn(1, 512), weight[:4])
        assert not are_few(drawn(1, 512).float(), weight)
        assert not are_few(drawn(1, 512), weight[:, ::2])
    with torch.no_grad():
        assert not are_few(drawn(1, 512), weight)
