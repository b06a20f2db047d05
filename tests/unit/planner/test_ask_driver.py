"""The query of GPUs by libcuda alone: its calls, against a stand-in for the library."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mixtral_run.planner import ask_driver

FREE = (70 * 2**30, 60 * 2**30 + 7)
TOTAL = (80 * 2**30, 141 * 2**30)
CAPABILITIES = ((8, 6), (9, 0))


class Driver:
    """STAND-IN for libcuda with two GPUs. Pointers are what ctypes passes; a context belongs to a thread."""

    def __init__(self, failing: str = "") -> None:
        self._failing, self._current = failing, 0
        self.retained: list[int] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            return 100 if name == self._failing else self._calls()[name](*arguments)

        call.__name__ = name
        return call

    def _calls(self) -> dict[str, Any]:
        def put(pointer: Any, value: int) -> int:
            pointer._obj.value = value
            return 0

        def retain(context: Any, device: ctypes.c_int) -> int:
            self.retained.append(device.value)
            return put(context, 1000 + device.value)

        def make_current(context: ctypes.c_void_p) -> int:
            self._current = (context.value or 0) - 1000
            return 0

        def memory(free: Any, total: Any) -> int:
            put(total, TOTAL[self._current])
            return put(free, FREE[self._current])

        return {
            "cuInit": lambda flags: 0 if flags == 0 else 1,
            "cuDeviceGetCount": lambda count: put(count, 2),
            "cuDeviceGet": put,
            "cuDevicePrimaryCtxRetain": retain,
            "cuCtxSetCurrent": make_current,
            "cuMemGetInfo_v2": memory,
            "cuDeviceGetAttribute": lambda value, number, device: put(
                value, CAPABILITIES[device.value][{75: 0, 76: 1}[number]]
            ),
        }


@pytest.mark.parametrize(("count", "expected"), [(1, [0]), (2, [0, 1]), (5, [0, 1]), (0, [0, 1])])
def test_each_gpu_that_is_asked_for_is_read(count: int, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    # One thread: the stand-in has one current context for all of them.
    monkeypatch.setattr(ask_driver, "ThreadPoolExecutor", lambda _: ThreadPoolExecutor(1))
    driver = Driver()
    assert ask_driver.read_gpus(driver, count) == [(FREE[each], TOTAL[each], CAPABILITIES[each]) for each in expected]
    assert driver.retained == expected


@pytest.mark.parametrize("name", ["cuInit", "cuDevicePrimaryCtxRetain", "cuMemGetInfo_v2"])
def test_a_call_that_fails_is_named(name: str) -> None:
    with pytest.raises(ask_driver.DriverError, match=f"^{name}: CUresult 100$"):
        ask_driver.read_gpus(Driver(name), 1)


def test_without_the_library_the_process_fails_in_one_line() -> None:
    code = "from mixtral_run.planner import ask_driver; ask_driver._LIBRARY = 'libmissing.so.1'; ask_driver.main()"
    done = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "libmissing.so.1" in done.stderr and done.stderr.count("\n") == 1
