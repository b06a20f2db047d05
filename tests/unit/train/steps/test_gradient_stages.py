"""The stages of an exchange of gradients: parameters, order, groups; and their flat buffers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_run.model.parallel.param_sharding import mark
from mixtral_run.train.steps import exchange as module
from mixtral_run.train.steps.exchange import Flat, groups_of, layer_of, stages_of

MIB = 1024**2


class Group:
    """STAND-IN for a process group of these ranks."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = list(ranks)

    def size(self) -> int:
        return len(self.ranks)


@pytest.fixture(autouse=True)
def ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_process_group_ranks", lambda group: group.ranks)


def mesh_of(context_size: int = 1, **groups: Group) -> Any:
    names = ("tensor_group", "expert_group", "data_group", "expert_data_group", "context_group")
    return SimpleNamespace(context_size=context_size, **{name: groups.get(name, Group(0)) for name in names})


def parameter(mib: float = 1, dtype: torch.dtype = torch.float32, **marks: bool) -> torch.nn.Parameter:
    found = torch.nn.Parameter(torch.empty(int(mib * MIB) // dtype.itemsize, dtype=dtype, device="meta"))
    mark(found, **marks)
    return found


EXPERT, SHARED, PARTIAL, DENSE = (parameter(**{name: True}) for name in ("expert", "shared", "partial", "split"))
ALL = (EXPERT, SHARED, PARTIAL, DENSE)


def groups(**given: Any) -> list[Group | None]:
    found = groups_of(ALL, mesh_of(**given))
    return [found.get(each) for each in ALL]  # type: ignore[misc]


def test_alone_there_is_nothing_to_sum() -> None:
    assert groups() == [None] * 4


def test_data_parallelism_alone_has_one_group_for_all() -> None:
    data, experts = Group(0, 1), Group(0, 1)
    assert groups(data_group=data, expert_data_group=experts) == [data] * 4


def test_spread_experts_have_a_group_of_their_own_and_what_they_share_is_left() -> None:
    data, experts = Group(0, 1, 2, 3), Group(0, 2)
    found = groups(data_group=data, expert_data_group=experts, expert_group=Group(0, 1))
    assert found == [experts, None, data, data]


def test_experts_that_are_spread_over_all_ranks_need_no_sum() -> None:
    data = Group(0, 1)
    assert groups(data_group=data, expert_group=Group(0, 1)) == [None, None, data, data]


def test_partial_gradients_are_left_under_tensor_parallelism() -> None:
    data, experts = Group(0, 2), Group(0, 1, 2, 3)
    assert groups(data_group=data, expert_data_group=experts, tensor_group=Group(0, 1)) == [
        experts,
        experts,
        None,
        data,
    ]


def test_tensor_parallelism_over_all_ranks_sums_the_experts_only() -> None:
    experts = Group(0, 1)
    # A partial gradient needs the sum over TP alone, whose group the pass uses.
    assert groups(expert_data_group=experts, tensor_group=Group(0, 1)) == [experts, experts, None, None]


def test_a_group_that_attention_uses_is_left() -> None:
    """Where CP takes all ranks, its group and that of the replicas are the same object."""
    everyone, experts = Group(0, 1), Group(0, 1)
    given = {"data_group": everyone, "context_group": everyone, "expert_data_group": experts}
    assert groups(context_size=2, **given) == [experts, experts, None, None]


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
    group = Group(0, 1)
    stages = stages_of(layers, dict.fromkeys(layers, group))  # type: ignore[arg-type]
    found = [each for stage in stages for part in stage.parts for each in part.parameters]
    assert [layers[each] for each in found] == sorted(sizes, reverse=True)
    return [
        (stage.lowest, sum(each.nbytes for part in stage.parts for each in part.parameters) / MIB) for stage in stages
    ]


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


def test_parts_have_one_group_and_one_dtype() -> None:
    each = [parameter(), parameter(dtype=torch.bfloat16), parameter(), parameter()]
    one, other = Group(0, 1), Group(0, 2)
    chosen = dict(zip(each, (one, one, other, one), strict=True))
    (stage,) = stages_of(dict.fromkeys(each, 0), chosen)  # type: ignore[arg-type]
    places = {id(parameter): place for place, parameter in enumerate(each)}
    found = [(part.group, [places[id(parameter)] for parameter in part.parameters]) for part in stage.parts]
    assert found == [(one, [0, 3]), (one, [1]), (other, [2])]


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
    group = Group(0, 1)
    exchange.stages = [module.Stage(1, (module.Part(group, (high,)),)), module.Stage(0, (module.Part(group, (low,)),))]  # type: ignore[arg-type]
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
