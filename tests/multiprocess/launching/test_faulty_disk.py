"""A disk that is full, fails or becomes read-only at one call of a writer: the error has the system's own word and a
next command, the last good state is readable, and the same command writes the new one afterwards."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multiprocess.conftest import environment_of
from tests.support.needs import missing

SOURCE = Path(__file__).parents[2] / "support" / "faulty_disk.c"


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        missing("a C compiler on Linux, for the disk that fails")
    file = tmp_path_factory.mktemp("library") / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-o", str(file), str(SOURCE), "-ldl"], check=True)
    return file


@pytest.mark.parametrize(
    ("scenario", "step"),
    # Every call of the short ones. A step that is prime to three brings each error to each kind of call; step 1 takes
    # two minutes for a conversion.
    [
        ("Convert", 16),
        ("ConvertBack", 5),
        ("Save", 4),
        ("SaveInBackground", 11),
        ("SaveKilled", 7),
        ("Export", 2),
        ("Merge", 19),
        ("QuantizedCache", 13),
        ("State", 1),
        ("Fetch", 1),
        ("Continue", 2),
    ],
)
def test_a_disk_that_fails_at_any_call(library: Path, tmp_path: Path, scenario: str, step: int) -> None:
    worker = "tests.multiprocess.launching.faulty_disk_worker"
    argv = [sys.executable, "-m", worker, scenario, str(tmp_path / "work"), str(step)]
    environment = environment_of(LD_PRELOAD=str(library), PYTHONWARNINGS="ignore")
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    *wrong, count = done.stdout.splitlines()
    assert [json.loads(line) for line in wrong] == []
    assert int(count) >= 5
