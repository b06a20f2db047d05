"""The stages of an exchange of gradients: parameters, order, groups; and their flat buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.model.dispatch.local import LocalDispatcher
from mixtral_run.train.steps import exchange as module
from mixtral_run.train.steps.exchange import Flat, describe_exchange, layer_of, open_exchange, stages_of
from mixtral_run.train.steps.step import EagerBackward

MIB = 1024**2


def parameter(mib: float = 1, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(int(mib * MIB) // dtype.itemsize, dtype=dtype, device="meta"))


def model_on(world: int, tp: int = 1, ep: int = 1, cp: int = 1, *, lora: bool = True) -> Any:
    """Return what the gate reads of a model."""
    mesh = SimpleNamespace(world_size=world, tensor_size=tp, expert_size=ep, context_size=cp)
    return SimpleNamespace(mesh=mesh, settings=SimpleNamespace(lora=object() if lora else None))


@pytest.mark.parametrize(
    ("words", "lora", "why"),
    [
        ((2,), True, None),
        ((64,), True, None),
        ((2,), False, "all weights are trained"),
        ((8, 2, 4), True, "the pass has collectives of its own under TP2/EP4"),
        ((2, 2, 1), True, "the pass has collectives of its own under TP2/EP1"),
        ((2, 1, 2), True, "the pass has collectives of its own under TP1/EP2"),
        ((2, 1, 1, 2), True, "the pass has collectives of its own under TP1/CP2/EP1"),
    ],
)
def test_only_data_parallelism_alone_overlaps(
    monkeypatch: pytest.MonkeyPatch, words: tuple[int, ...], lora: bool, why: str | None
) -> None:
    monkeypatch.setattr(module, "GradientExchange", lambda _: SimpleNamespace(stages=[1, 2, 3]))
    model = model_on(*words, lora=lora)
    exchange = open_exchange(model)
    assert (exchange is None) == (why is not None)
    during = "Gradients are summed during the backward pass, in 3 stages"
    found = describe_exchange(model, exchange)
    assert found == (during if why is None else f"Gradients are summed after the backward pass: {why}")


def test_one_rank_sums_nothing_and_says_nothing() -> None:
    assert open_exchange(model_on(1)) is None and describe_exchange(model_on(1), None) is None


def test_a_pass_that_may_be_taken_again_does_not_overlap() -> None:
    """Its wrong gradients would be on their way."""
    with pytest.raises(AssertionError, match="taken again"):
        EagerBackward(model_on(2), LocalDispatcher(8), None, module.GradientExchange.__new__(module.GradientExchange))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("gpt.decoder.layers.11.mlp.router.weight", 11),
        ("gpt.embedding.word_embeddings.weight", -1),
        ("gpt.decoder.final_layernorm.weight", 32),
        ("gpt.output_layer.weight", 32),
    ],
)
def test_layers(name: str, layer: int) -> None:
    assert layer_of(name, 32) == layer


def sizes_of(sizes: dict[int, float], dtype: torch.dtype = torch.float32) -> list[tuple[int, float]]:
    """Return the lowest layer and the MiB of each stage, for the MiB of layers."""
    layers = {parameter(mib, dtype): number for number, mib in sizes.items()}
    stages = stages_of(layers)
    found = [each for stage in stages for part in stage.parts for each in part]
    assert [layers[each] for each in found] == sorted(sizes, reverse=True)
    return [(stage.lowest, sum(each.nbytes for part in stage.parts for each in part) / MIB) for stage in stages]


def test_a_stage_has_about_a_sixteenth() -> None:
    """32 layers of 26 MiB: 16 stages of two."""
    assert sizes_of(dict.fromkeys(range(32), 26.0)) == [(30 - 2 * number, 52.0) for number in range(16)]


def test_small_stages_are_joined() -> None:
    """1 MiB a layer: four are the least; the last stage is what is left."""
    assert sizes_of(dict.fromkeys(range(6), 1.0)) == [(2, 4.0), (0, 2.0)]


def test_large_stages_have_one_layer() -> None:
    """A sixteenth would be 300 MiB; two layers of 160 MiB are more than 256."""
    assert sizes_of(dict.fromkeys(range(30), 160.0)) == [(29 - number, 160.0) for number in range(30)]


def test_embedding_and_output_layer_are_the_ends() -> None:
    assert sizes_of({-1: 500.0, 0: 20.0, 1: 20.0, 2: 500.0}) == [(2, 500.0), (0, 40.0), (-1, 500.0)]


def test_a_large_layer_is_not_joined_to_what_waits_before_it() -> None:
    """A sixteenth are 34 MiB, for which 20 wait; with the next layer they would be more than 256."""
    assert sizes_of({2: 20.0, 1: 250.0, 0: 280.0}) == [(2, 20.0), (1, 250.0), (0, 280.0)]


def test_parts_have_one_dtype() -> None:
    each = [parameter(), parameter(dtype=torch.bfloat16), parameter(), parameter()]
    (stage,) = stages_of(dict.fromkeys(each, 0))
    places = {id(parameter): place for place, parameter in enumerate(each)}
    assert [[places[id(parameter)] for parameter in part] for part in stage.parts] == [[0, 2, 3], [1]]


def test_a_flat_buffer_has_aligned_views_and_zeros_for_what_is_missing() -> None:
    parameters = [torch.nn.Parameter(torch.empty(shape)) for shape in ((3, 5), (2,), (32,))]
    parameters[0].grad, parameters[2].grad = torch.randn(3, 5), torch.randn(32)
    flat = Flat.of(parameters)
    assert [view.data_ptr() - flat.buffer.data_ptr() for view in flat.views] == [0, 128, 256]
    assert torch.equal(flat.views[0], parameters[0].grad) and torch.equal(flat.views[2], parameters[2].grad)
    assert flat.buffer[15:64].tolist() == [0.0] * 49
    assert all(view.is_contiguous() for view in flat.views) and not flat.holds(parameters)
    for each, view in zip(parameters, flat.views, strict=True):
        each.grad = view
    assert flat.holds(parameters)


def test_a_gradient_that_comes_late_is_an_error() -> None:
    """It would be missing in the sum, in silence."""
    low, high = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    exchange = module.GradientExchange.__new__(module.GradientExchange)
    exchange.stages = [module.Stage(1, ((high,),)), module.Stage(0, ((low,),))]
    exchange.flats, exchange._events = [None, None], []
    for each, layer in ((low, 0), (high, 1)):
        each.register_post_accumulate_grad_hook(lambda _, layer=layer: exchange._reached(layer))
    with exchange.watching(starts=False):
        (high * 2.0).sum().backward()
        (low * 3.0).sum().backward()
        assert exchange.flats[0] is not None and exchange.flats[1] is None
        with pytest.raises(AssertionError, match="layer 1 arrived after"):
            (high * 4.0).sum().backward()
    assert exchange.flats[1] is not None and exchange.flats[1][0].buffer[:2].tolist() == [3.0, 3.0]
