"""When torch's allocator lets segments grow, with which settings, and what happens on a GPU whose driver cannot."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from mixtral_run.model.allocator import VARIABLES, growing_segments, settings_of

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("given", "on", "off"),
    [
        ({}, "expandable_segments:True", "expandable_segments:False"),
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            "max_split_size_mb:512,expandable_segments:True",
            "max_split_size_mb:512,expandable_segments:False",
        ),
        (
            # torch reads the second variable only without the first.
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"},
            "max_split_size_mb:64,expandable_segments:True",
            "max_split_size_mb:64,expandable_segments:False",
        ),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, None, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, None, None),
    ],
)
def test_what_the_user_set_is_kept(given: dict[str, str], on: str | None, off: str | None) -> None:
    assert (settings_of(given, grow=True), settings_of(given, grow=False)) == (on, off)


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """STAND-IN for the allocator of a GPU: the settings that it gets, one after the other."""
    found: list[str] = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", found.append)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: found.append("probe"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append("free blocks are given back"))
    return found


def test_segments_grow_within_the_block_only(settings: list[str]) -> None:
    with pytest.raises(KeyError), growing_segments(GPU):
        assert settings == ["free blocks are given back", "expandable_segments:True", "probe"]
        raise KeyError
    assert settings[3:] == ["expandable_segments:False"]
    with growing_segments(torch.device("cpu")):
        pass
    assert len(settings) == 4


def test_a_user_who_decided_is_left_alone(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    with growing_segments(GPU):
        pass
    assert settings == []


def test_a_driver_that_cannot_is_reported(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA driver error: operation not supported\nmore")

    monkeypatch.setattr(torch, "empty", refuse)
    with caplog.at_level(logging.WARNING), growing_segments(GPU):
        assert settings[-1] == "expandable_segments:False"
    assert "cannot grow here (CUDA driver error: operation not supported)" in caplog.text


def test_a_torch_without_the_setting_is_reported(
    settings: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(torch._C, "_accelerator_setAllocatorSettings")
    with caplog.at_level(logging.WARNING), growing_segments(GPU):
        pass
    assert "cannot grow here" in caplog.text and settings == ["free blocks are given back"]
