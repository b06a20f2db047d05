"""`python -m mixtral_run.planner.ask_driver COUNT`: print memory and compute capability of GPUs, without torch.

Prints a JSON list with [free bytes, total bytes, [major, minor]] of each of the first COUNT GPUs (0: of all), as
`torch.cuda.mem_get_info` and `torch.cuda.get_device_capability` return them. Importing torch would take seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, cuda.h

Gpu = tuple[int, int, tuple[int, int]]


class DriverError(Exception):
    """A call of the driver that failed, with its CUresult."""


def read_gpus(driver: Any, count: int) -> list[Gpu]:
    """Return free and total bytes and the compute capability of the first `count` GPUs; 0 means all.

    Creates a context on each GPU, all at once: a context takes a third of a second and more.

    driver: the loaded libcuda.
    """
    _call(driver.cuInit, 0)
    found = ctypes.c_int()
    _call(driver.cuDeviceGetCount, ctypes.byref(found))
    indices = range(min(count or found.value, found.value))
    with ThreadPoolExecutor(max(1, len(indices))) as pool:
        return list(pool.map(lambda index: _read(driver, index), indices))


def _read(driver: Any, index: int) -> Gpu:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call(driver.cuDeviceGet, ctypes.byref(device), index)
    _call(driver.cuDevicePrimaryCtxRetain, ctypes.byref(context), device)
    _call(driver.cuCtxSetCurrent, context)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # The name with _v2 is the one with 64-bit sizes, which cuda.h calls cuMemGetInfo.
    _call(driver.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total))
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        _call(driver.cuDeviceGetAttribute, ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return free.value, total.value, (capability[0], capability[1])


def _call(function: Any, *arguments: Any) -> None:
    result = function(*arguments)
    if result != 0:
        raise DriverError(f"{getattr(function, '__name__', function)}: CUresult {result}")


def main() -> None:
    """Print the answer and leave at once: the end of the process destroys its contexts."""
    try:
        print(json.dumps(read_gpus(ctypes.CDLL(_LIBRARY), int(sys.argv[1]))), flush=True)
    except (OSError, AttributeError, DriverError) as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    main()
