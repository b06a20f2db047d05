"""Compile what Triton compiles in C at run time, without a GPU: its access to the driver, and, before Triton 3.7, a
function for each kernel that launches it.

Both are Python modules in Triton's cache that are linked with the driver's library. Where there is none, as in a build
of the image, they are linked with an empty library of its name. It is in no module: a job finds the driver's own.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DRIVER = "libcuda.so.1"
_PATH_VARIABLE = "TRITON_LIBCUDA_PATH"


class Launchers:
    """The modules that one process compiles. failed: what could not be compiled; a job then compiles it itself."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def utils(self) -> Any:
        """Compile Triton's access to the driver, and return it; None if that fails."""
        with self._noting():
            from triton.backends.nvidia.driver import CudaUtils

            return CudaUtils()
        return None

    def compile(self, kernel: Any) -> None:
        """Compile what launches a compiled kernel. Nothing is left to compile where one function launches them all."""
        with self._noting():
            from triton.backends.nvidia.driver import CudaLauncher

            CudaLauncher(kernel.src, kernel.metadata)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.failed.append(f"launcher: {type(error).__name__}: {error}".splitlines()[0])


@contextmanager
def driver_library() -> Iterator[None]:
    """Let Triton, in this process and in those forked from it, link with the driver's library, if need be an empty one.

    Call it once in a process, which keeps the empty library. If none can be made, nothing can be compiled in C.
    """
    if _has_driver():
        yield
        return
    flags = sys.getdlopenflags()
    with tempfile.TemporaryDirectory() as folder:
        if _make_empty(Path(folder)):
            os.environ[_PATH_VARIABLE] = folder
            # A module that is loaded finds this library by its name, and its functions only when it calls them.
            ctypes.CDLL(str(Path(folder) / _DRIVER))
            sys.setdlopenflags(os.RTLD_LAZY)
        try:
            yield
        finally:
            sys.setdlopenflags(flags)
            os.environ.pop(_PATH_VARIABLE, None)


def _has_driver() -> bool:
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    return True


def _make_empty(folder: Path) -> bool:
    """Make an empty library of the driver's name. Return False without a compiler."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return False
    source = folder / "empty.c"
    source.write_text("")
    argv = [compiler, "-shared", f"-Wl,-soname,{_DRIVER}", "-o", str(folder / _DRIVER), str(source)]
    return subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == 0
