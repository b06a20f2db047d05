"""The driver's library for what Triton compiles in C: the machine's own, or an empty one while nothing runs."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, os, subprocess, sys
from pathlib import Path
from mixtral_run.model import compile_launchers
real = ctypes.CDLL
def without_driver(name, *more, **kinds):
    if name == "libcuda.so.1":
        raise OSError("none")
    return real(name, *more, **kinds)
ctypes.CDLL = without_driver
flags = sys.getdlopenflags()
source = Path(sys.argv[1]) / "launcher.c"
source.write_text("int cuLaunchKernel(void); int launch(void) { return cuLaunchKernel(); } int two(void) { return 2; }")
module = source.with_suffix(".so")
with compile_launchers.driver_library():
    folder = os.environ["TRITON_LIBCUDA_PATH"]
    subprocess.run(
        ["gcc", "-shared", "-fPIC", str(source), "-o", str(module), f"-L{folder}", "-l:libcuda.so.1"], check=True
    )
    # As Python loads modules: it would not with functions that are looked up at once.
    print(real(str(module), mode=sys.getdlopenflags()).two())
print(sys.getdlopenflags() == flags, "TRITON_LIBCUDA_PATH" in os.environ, Path(folder).exists())
launchers = compile_launchers.Launchers()
launchers.compile(object())
print(len(launchers.failed), launchers.failed[0].split(":")[0])
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_modules_are_linked_with_a_library_that_they_find_by_its_name_later(tmp_path: object) -> None:
    argv = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2", "True False False", "1 launcher"]
