"""The context of a GPU in a thread: the driver's calls in their order, and what fails is left to torch."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest

from mixtral_run.model.parallel import gpu_context


class Driver:
    """Stands for libcuda. fails: name of the call that returns an error."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, int]] = []
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == "cuDeviceGet":
                arguments[0]._obj.value = 40 + arguments[1]
            value = arguments[-1]
            self.calls.append((name, value.value if isinstance(value, ctypes.c_int) else value))
            return int(name == self._fails)

        return call


@pytest.mark.parametrize("number", range(4), ids=["none fails", "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"])
def test_the_context_is_that_of_the_gpu(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    calls = [("cuInit", 0), ("cuDeviceGet", 3), ("cuDevicePrimaryCtxRetain", 43)]
    driver = Driver(calls[number - 1][0] if number else "")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver if name == "libcuda.so.1" else None)
    gpu_context.begin_context(3).join(30)
    assert driver.calls == calls[: number or 3]


@pytest.mark.parametrize("error", [OSError("no such library"), None])
def test_a_machine_without_a_driver_is_no_error(monkeypatch: pytest.MonkeyPatch, error: OSError | None) -> None:
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def load(_: str) -> object:
        if error is not None:
            raise error
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    thread = gpu_context.begin_context(0)
    thread.join(30)
    assert not thread.is_alive() and not raised
