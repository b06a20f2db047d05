"""Passes of generation: cached keys and values, fixed shapes, and capture as a CUDA graph."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mixtral_run.config.launch import LaunchConfig
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.decode import CapturedDecoding, Decoding, FixedShapeDecoding, decoding_of
from mixtral_run.model.mixtral import MixtralModel, ModelSettings, build_model
from mixtral_run.model.parallel.mesh import open_mesh
from tests.multiprocess.conftest import SMALL


@contextmanager
def random_model() -> Iterator[MixtralModel]:
    config = LaunchConfig(tensor_model_parallel_size=1, expert_model_parallel_size=1, device="cpu")
    with open_mesh(config) as mesh, torch.inference_mode():
        model = build_model(SMALL, ModelSettings(torch.float32, False), mesh).eval()
        for index, weight in enumerate(model.parameters()):
            weight.data.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(index))
        yield model


def test_logits_of_the_last_position_alone() -> None:
    with random_model() as model:
        tokens = torch.tensor([[1, 5, 9, 200], [1, 2, 3, 4]])
        last = model.logits(tokens, last_only=True)
        every = model.logits(tokens)
    assert last.shape == (2, 1, SMALL.vocab_size)
    assert every.shape == (2, 4, SMALL.vocab_size)
    torch.testing.assert_close(last, every[:, -1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(4, 4), (2, 4), (1, 1)])
@pytest.mark.parametrize("kind", [Decoding, FixedShapeDecoding])
def test_one_token_at_a_time_gives_the_logits_of_whole_rows(kind: type[Decoding], lengths: tuple[int, ...]) -> None:
    """Also if a row is padded, and if the cache is longer than needed."""
    longest, new = max(lengths), 5
    whole = torch.randint(1, SMALL.vocab_size, (len(lengths), longest + new))
    padding = torch.tensor([longest - length for length in lengths])
    with random_model() as model:
        passes = kind(model, padding, longest + new + 3)
        found = [passes(whole[:, :longest]), *(passes(whole[:, [at]]) for at in range(longest, longest + new))]
        for row, begin in enumerate(padding.tolist()):
            expected = model.logits(whole[row : row + 1, begin:])[0]
            for number, logits in enumerate(found):
                torch.testing.assert_close(
                    logits[row], expected[longest - begin - 1 + number], rtol=1e-4, atol=1e-5, msg=f"{row}, {number}"
                )


def test_a_row_that_has_ended_does_not_change_the_others() -> None:
    rows, sampling = [[1, 5, 9], [1, 2], [7]], Sampling(12, 0.0, 1.0, 0)
    with random_model() as model:
        free = [continue_rows(model, [row], (), sampling)[0] for row in rows]
        ends = free[0][1]
        for kind in (Decoding, FixedShapeDecoding):
            found = continue_rows(model, rows, {ends}, sampling, decoding=kind)
            for mine, alone in zip(found, free, strict=True):
                count = alone.index(ends) + 1 if ends in alone else len(alone)
                assert mine == alone[:count]


class FakeGraph:
    """STAND-IN: CPUs have no CUDA graphs. tests/gpu compares the logits of real graphs with eager ones."""

    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


@pytest.mark.parametrize("problem", ["cannot be captured", "its logits differ"])
def test_generation_stays_eager_if_the_capture_fails(
    problem: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inside = False

    @contextmanager
    def graph(_: FakeGraph, **__: object) -> Iterator[None]:
        nonlocal inside
        inside = True
        yield
        inside = False
        if problem == "cannot be captured":
            raise RuntimeError("cannot be captured\nand more")  # as torch does at the end of a capture

    def logits(*words: Any, **named: Any) -> torch.Tensor:
        return right(*words, **named) * (0 if inside and problem == "its logits differ" else 1)

    right = MixtralModel.logits
    replayed: list[FakeGraph] = []
    monkeypatch.setattr(MixtralModel, "logits", logits)
    monkeypatch.setattr(FakeGraph, "replay", lambda graph: replayed.append(graph))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with random_model() as model:
        rows, sampling = [[1, 5, 9], [1, 2]], Sampling(6, 0.0, 1.0, 0)
        found = continue_rows(model, rows, {0}, sampling, decoding=CapturedDecoding)
        assert found == continue_rows(model, rows, {0}, sampling, decoding=Decoding)
    assert len(replayed) == (problem == "its logits differ")
    assert [record.message for record in caplog.records] == [
        f"Generation is not captured as a CUDA graph, and slower: {problem}."
    ]


def test_nothing_is_captured_on_a_cpu() -> None:
    with random_model() as model:
        assert decoding_of(model, 1, 1000) is Decoding
