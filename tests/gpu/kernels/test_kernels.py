"""The small kernels beside the same in plain torch on the CPU, in fp32, forward and backward; and the recorded step."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.model.attention.packed_attention import PackedSizes
from mixtral_run.model.attention.rotary import Rotary, split_and_rotate
from mixtral_run.model.dispatch.permute import add_rows, permute, sort_by_expert, sorted_probs, unpermute
from mixtral_run.model.kernels.loss.cross_entropy import cross_entropy
from mixtral_run.model.kernels.routing.router_probs import row_products
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model, is_adapter
from mixtral_run.model.norm import RMSNorm
from mixtral_run.model.parallel.mesh import Mesh, open_mesh
from mixtral_run.model.routing.moe import Router, choose, router_logits
from mixtral_run.train.data.samples import GlobalBatch, MicroBatch, MockSamples, batches
from mixtral_run.train.steps.cuda_graph import CapturedBackward, backward_of, execution_of
from mixtral_run.train.steps.step import StepResult, train_step, trainable


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("angles_of_each", [False, True])
def test_split_and_rotate(batch: int, angles_of_each: bool) -> None:
    mixed = torch.randn(37, batch, 3, 6, 32)
    positions = torch.randint(0, 1000, (batch if angles_of_each else 1, 37))
    results = []
    for device in ("cuda", "cpu"):
        states = mixed.to(device).requires_grad_(True)
        angles = Rotary(32, 1e6, torch.device(device)).inputs(positions.to(device), torch.float32)
        parts = split_and_rotate(states, *angles)
        sum(
            (part * torch.linspace(-1, 1, part.numel(), device=device).view_as(part)).sum() for part in parts
        ).backward()
        results.append((*(part.detach().cpu() for part in parts), states.grad.cpu()))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden", [8, 1000, 4096])
def test_permute(hidden: int) -> None:
    tokens, weights = torch.randn(41, hidden), torch.rand(41, 2)
    order = torch.randint(0, 8, (82,)).argsort(stable=True)
    results = []
    for device in ("cuda", "cpu"):
        mine = tokens.to(device).requires_grad_(True)
        share = weights.to(device).requires_grad_(True)
        there, back = order.to(device), order.argsort().to(device)
        rows = permute(mine, there // 2, back, 2)
        scaled = rows * torch.linspace(-1, 1, rows.numel(), device=device).view_as(rows)
        output = unpermute(scaled, share, there, back)
        output.square().sum().backward()
        results.append((output.detach().cpu(), mine.grad.cpu(), share.grad.cpu()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_captured_step_is_the_eager_step() -> None:
    architecture = dataclasses.replace(
        MIXTRAL_8X7B,
        num_layers=2,
        hidden_size=512,
        ffn_hidden_size=1024,
        kv_channels=64,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=1024,
    )
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    losses: list[list[float]] = []
    with open_mesh(config) as mesh:
        for captured in (False, True):
            lora = LoraSettings(16, 32.0, 0.0, ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), 1)
            model = build_model(architecture, ModelSettings(torch.bfloat16, True, lora), mesh).train()
            generator = torch.Generator("cuda").manual_seed(3)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "norm" not in name and ".linear_in" not in name and ".linear_out" not in name:
                        parameter.normal_(0.0, 0.05, generator=generator)
            assert execution_of(model, 256).captured
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, fused=True)
            stream = batches(MockSamples(1024, 128, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            backward = CapturedBackward(model) if captured else None
            counts = model.count_choices()
            losses.append([train_step(model, optimizer, next(stream), 1.0, backward).loss for _ in range(6)])
            # The passes before the capture and the capture itself do not count.
            assert counts.take().sum(dim=1).tolist() == [2 * 4 * 128 * 6] * 2
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert abs(losses[0][0] - losses[0][-1]) > 0.01


@pytest.mark.parametrize("base_precision", ["bf16", "fp8"])
def test_selective_recomputation_captured_or_not_is_near_a_step_without(base_precision: str) -> None:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    steps: list[list[StepResult]] = []
    with open_mesh(config) as mesh:
        for recompute, captured in (("none", False), ("selective", False), ("selective", True)):
            model = small_model(mesh, recompute, base_precision)
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            stream = batches(MockSamples(1024, 128, 1), seed=1, micro_batch_size=2, global_batch_size=4)
            backward = CapturedBackward(model) if captured else None
            steps.append([train_step(model, optimizer, next(stream), 1.0, backward) for _ in range(6)])
    without, eager, again = steps
    assert again == eager
    assert eager[0].loss == without[0].loss
    assert eager[0].grad_norm == pytest.approx(without[0].grad_norm, rel=2e-3)
    # AdamW's first step goes by the gradients' signs alone, also of those that a rounding turns.
    assert [step.loss for step in eager] == pytest.approx([step.loss for step in without], rel=1e-2)
    assert abs(without[0].loss - without[-1].loss) > 0.01


def test_a_captured_step_of_packed_rows_is_the_eager_one() -> None:
    """Rows of few samples and of many, each micro batch other ones; two of them in each step."""
    rows = [(128,), (40, 1, 60, 27), (5,) * 25 + (3,), (100, 28), (64, 64), (17, 50, 61), (1, 127), (90, 30, 8)]
    most = PackedSizes(max(map(len, rows)), max(map(max, rows)))
    draw = torch.Generator().manual_seed(1)
    micros = []
    for pair in zip(rows[::2], rows[1::2], strict=True):
        tokens, labels = (torch.randint(0, 1024, (2, SEQ_LENGTH), generator=draw) for _ in range(2))
        positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in pair])
        mask = (torch.rand(2, SEQ_LENGTH, generator=draw) > 0.2).float()
        micros.append(MicroBatch(tokens, labels, mask, positions, pair))
    parts = [GlobalBatch(tuple(micros[at : at + 2]), 300, 4) for at in (0, 2)]
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cuda")
    steps: list[list[StepResult]] = []
    with open_mesh(config) as mesh:
        for captured in (False, True):
            model = small_model(mesh, "none", "bf16")
            optimizer = torch.optim.AdamW(trainable(model), lr=1e-3, fused=True)
            with backward_of(model, 2 * SEQ_LENGTH, captured=captured, most=most) as backward:
                assert isinstance(backward, CapturedBackward) == captured
                steps.append([train_step(model, optimizer, parts[step % 2], 1.0, backward) for step in range(6)])
    eager, replayed = steps
    assert replayed[0].loss == pytest.approx(eager[0].loss, rel=1e-6)
    assert replayed[0].grad_norm == pytest.approx(eager[0].grad_norm, rel=2e-3)
    assert [step.loss for step in replayed] == pytest.approx([step.loss for step in eager], rel=1e-2)
    assert abs(eager[0].loss - eager[-1].loss) > 0.01


SEQ_LENGTH = 128


def small_model(
    mesh: Mesh,
    recompute: str,
    base_precision: str,
    layers: int = 2,
    dropout: float = 0.0,
    sequence_parallel: bool = True,
    adapted: bool = True,
    kernels: str = "auto",
    attention_precision: str = "bf16",
) -> MixtralModel:
    """A few layers with the same random weights each time, wide enough for every kernel."""
    architecture = dataclasses.replace(
        MIXTRAL_8X7B,
        num_layers=layers,
        hidden_size=512,
        ffn_hidden_size=1024,
        kv_channels=64,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=1024,
    )
    targets = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    lora = LoraSettings(16, 32.0, dropout, targets, 1) if adapted else None
    settings = ModelSettings(
        torch.bfloat16,
        sequence_parallel,
        lora,
        recompute,
        base_precision,
        kernels,
        attention_precision=attention_precision,
    )
    model = build_model(architecture, settings, mesh).train()

    def fill() -> None:
        for name, weight in model.named_parameters():
            if not (is_adapter(name) or weight.is_meta or "norm" in name):
                # Every process its own experts; what is not an expert's, the same in all.
                seed = len(name) + 1000 * mesh.expert_rank * (".experts." in name)
                weight.data.normal_(0.0, 0.05, generator=torch.Generator("cuda").manual_seed(seed))

    fill()
    model.quantize_attention()
    model.quantize_experts(fill)
    assert execution_of(model, 256).captured or not adapted
    return model


@pytest.mark.parametrize("hidden", [64, 1000, 4096])
def test_a_residual_is_added_as_by_a_second_kernel(hidden: int) -> None:
    """Bit for bit, as the factors of ones that are left out."""
    rows, residual = (torch.randn(count, hidden, device="cuda").bfloat16() for count in (82, 41))
    inverse, probs = torch.randperm(82, device="cuda"), torch.rand(41, 2, device="cuda")
    for end in (None, torch.tensor(60, device="cuda", dtype=torch.int32)):
        for factors in (probs, None):
            alone = add_rows(rows, factors, inverse, 2, end)
            assert torch.equal(add_rows(rows, factors, inverse, 2, end, residual), residual + alone)
        assert torch.equal(alone, add_rows(rows, torch.ones_like(probs), inverse, 2, end))


# Up to 8,192 choices and 16 experts one kernel sorts.
@pytest.mark.parametrize("choices", [1, 2, 1000, 1024, 4096, 8192, 8196, 40000])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 16, 17, 128])
def test_sort_by_expert(choices: int, count: int) -> None:
    chosen = torch.randint(0, count, (choices,))
    if count > 1:
        # One that nobody chose.
        chosen[chosen == 1] = 0
    topk = 2 if choices % 2 == 0 else 1
    found, right = (sort_by_expert(each, count, topk) for each in (chosen.cuda(), chosen))
    for mine, expected in zip(found, right, strict=True):
        assert mine.dtype is expected.dtype
        assert torch.equal(mine.cpu(), expected)


def test_router_logits() -> None:
    tokens, weight = torch.randn(41, 4096).bfloat16(), torch.randn(8, 4096).bfloat16()
    results = []
    for device in ("cuda", "cpu"):
        mine = tokens.to(device).requires_grad_(True)
        logits = router_logits(mine, weight.to(device))
        (logits * torch.linspace(-1, 1, logits.numel(), device=device).view_as(logits)).sum().backward()
        results.append((logits.detach().cpu(), mine.grad.cpu().float()))
    assert results[0][0].dtype is torch.float32
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(41, 8, 2), (2048, 8, 2), (5, 6, 3), (33, 4, 1), (70, 64, 4)])
def test_choice_of_experts(tokens: int, experts: int, topk: int) -> None:
    logits, weights = torch.randn(tokens, experts), torch.randn(tokens, topk)
    results = []
    for device, dtype in (("cuda", torch.float32), ("cpu", torch.float64)):
        mine = logits.to(device, dtype).requires_grad_(True)
        probs, chosen = choose(mine, topk)
        assert not chosen.requires_grad
        (probs * weights.to(probs)).sum().backward()
        assert mine.grad is not None
        results.append((chosen.cpu(), probs.detach().cpu().double(), mine.grad.cpu().double()))
    (chosen, *numbers), (expected_choice, *expected) = results
    assert torch.equal(chosen, expected_choice)
    for found, exact in zip(numbers, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("tokens", "experts", "topk"), [(41, 8, 2), (512, 8, 2), (5, 6, 3), (33, 4, 1), (70, 64, 4)])
def test_the_gradient_of_the_router_is_that_of_its_parts(tokens: int, experts: int, topk: int) -> None:
    """Bit for bit, with the other gradient of the tokens and without."""
    router = Router(
        SimpleNamespace(
            num_moe_experts=experts,
            hidden_size=1088,
            moe_router_topk=topk,
            params_dtype=torch.bfloat16,
            sequence_parallel=False,
        )
    ).requires_grad_(False)
    router.weight.normal_()
    drawn, weights = torch.randn(tokens, 1088, device="cuda").bfloat16(), torch.randn(tokens, topk, device="cuda")
    others = torch.randn_like(drawn)
    mine, theirs = (drawn.clone().requires_grad_(True) for _ in range(2))
    probs, chosen, passed = router(mine)
    parts = choose(router_logits(theirs, router.weight), topk)
    assert torch.equal(probs, parts[0])
    assert torch.equal(chosen, parts[1])
    assert torch.equal(passed, drawn)
    assert not chosen.requires_grad
    for use in ((True, False), (False, True), (True, True)):
        losses = [
            sum(each for each, used in zip(((of[0] * weights).sum(), (of[1] * others).sum()), use, strict=True) if used)
            for of in ((probs, passed), (parts[0], theirs))
        ]
        found, right = (
            torch.autograd.grad(loss, leaf, retain_graph=True)[0]
            for loss, leaf in zip(losses, (mine, theirs), strict=True)
        )
        assert torch.equal(found, right)


def test_logits_that_are_no_numbers_choose_experts_that_exist() -> None:
    probs, chosen = choose(torch.full((3, 6), float("nan"), device="cuda"), 2)
    assert probs.isnan().all()
    assert bool(((chosen >= 0) & (chosen < 6)).all())


def test_probs_in_the_order_of_the_rows() -> None:
    probs, chosen = torch.rand(41, 2), torch.randint(0, 8, (82,))
    results = []
    for device in ("cuda", "cpu"):
        mine = probs.to(device).requires_grad_(True)
        order, inverse, *_ = sort_by_expert(chosen.to(device), 8, 2)
        rows = sorted_probs(mine, order, inverse)
        (rows * torch.arange(82, device=device)).sum().backward()
        results.append((rows.detach().cpu(), mine.grad))
    order = chosen.argsort(stable=True)
    assert torch.equal(results[0][0], probs.flatten()[order])
    places = torch.empty(82)
    places[order] = torch.arange(82.0)
    for _, gradient in results:
        assert gradient is not None
        assert torch.equal(gradient.cpu(), places.view(41, 2))


@pytest.mark.parametrize("vocabulary", [1000, 4096, 32000])
def test_cross_entropy(vocabulary: int) -> None:
    """Compare losses and gradients with float64; the last label does not exist, some logits are -inf."""
    logits, labels = (torch.randn(13, 3, vocabulary) * 4).bfloat16(), torch.randint(0, vocabulary - 9, (13, 3))
    logits[..., -7:] = float("-inf")
    labels[-1, -1] = -100
    weights = torch.rand(13, 3)
    mine = logits.cuda().requires_grad_(True)
    losses = cross_entropy(mine, labels.cuda())
    (losses * weights.cuda()).sum().backward()
    exact = logits.double().requires_grad_(True)
    expected = torch.nn.functional.cross_entropy(exact.view(-1, vocabulary), labels.view(-1), reduction="none")
    (expected * weights.view(-1)).sum().backward()
    assert mine.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(
        losses.detach().cpu().double().view(-1)[:-1], expected.detach()[:-1], rtol=1e-5, atol=1e-5
    )
    found, right = mine.grad.cpu().double().view(39, -1)[:-1], exact.grad.view(39, -1)[:-1]
    assert float((found - right).norm()) <= 3e-3 * float(right.norm())


@pytest.mark.parametrize("with_addition", [False, True])
@pytest.mark.parametrize("shape", [(41, 1, 4096), (7, 3, 1000), (300, 64)])
def test_norm_with_what_is_added_before_and_behind(shape: tuple[int, ...], with_addition: bool) -> None:
    """Compare sum, norm and gradients with float64; the recipe returns the norm bit for bit."""
    norm = RMSNorm(SimpleNamespace(params_dtype=torch.bfloat16, sequence_parallel=False), shape[-1], 1e-5)
    norm.requires_grad_(False)
    norm.weight.copy_(torch.rand(shape[-1]) + 0.5)
    drawn = [(torch.randn(shape) * 3).bfloat16().cuda() for _ in range(2 if with_addition else 1)]
    weights = [torch.randn(shape).bfloat16().cuda() for _ in range(2)]
    parts = [each.clone().requires_grad_(True) for each in drawn]
    total, normed = norm.joined(*parts)
    (total * weights[0] + normed * weights[1]).sum().backward()
    assert torch.equal(total, drawn[0] + drawn[1] if with_addition else drawn[0])
    recipe = norm.recipe(total)
    assert torch.equal(recipe.make(*recipe.sources), normed)
    exact = total.detach().double().requires_grad_(True)
    expected = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    (exact * weights[0].double() + expected * weights[1].double()).sum().backward()
    assert exact.grad is not None
    assert float((normed.double() - expected).norm()) <= 3e-3 * float(expected.norm())
    for part in parts:
        assert part.grad is not None
        assert float((part.grad.double() - exact.grad).norm()) <= 3e-3 * float(exact.grad.norm())


@pytest.mark.parametrize("width", [8, 1000, 14336])
def test_row_products(width: int) -> None:
    first, second = torch.randn(41, width).bfloat16(), torch.randn(41, width).bfloat16()
    expected = (first.double() * second.double()).sum(-1)
    found = row_products(first.cuda(), second.cuda()).cpu().double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-2)
