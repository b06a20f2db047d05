"""The context of this process on its GPU, created while the process does other things.

torch creates it with its first operation there, and holds the interpreter meanwhile.
"""

from __future__ import annotations

import ctypes
import threading

_LIBRARY = "libcuda.so.1"


def begin_context(index: int) -> threading.Thread:
    """Begin to create the primary context of a GPU, which torch then uses, in a thread. Return the thread.

    A failure is left to torch, which reports it with its first operation on the GPU.
    """
    thread = threading.Thread(target=_create, args=(index,), name="GPU context", daemon=True)
    thread.start()
    return thread


def _create(index: int) -> None:
    try:
        # ctypes gives the interpreter to other threads during each call.
        driver = ctypes.CDLL(_LIBRARY)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    except (OSError, AttributeError):
        return
