"""A disk that is full, fails or becomes read-only at one call of a writer: the error has the system's own word and a
next command, the last good state is readable, and the same command writes the new one afterwards."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="session")
def worker(library: Path) -> Iterator[subprocess.Popen[str]]:
    """One process for all scenarios: its imports take longer than most of them."""
    argv = [sys.executable, "-m", "tests.multiprocess.launching.faulty_disk_worker"]
    environment = environment_of(LD_PRELOAD=str(library), PYTHONWARNINGS="ignore")
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=SOURCE.parents[2]
    ) as process:
        yield process
        process.kill()


@pytest.mark.timeout(600)
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
def test_a_disk_that_fails_at_any_call(worker: subprocess.Popen[str], tmp_path: Path, scenario: str, step: int) -> None:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(json.dumps([scenario, str(tmp_path / "work"), step]) + "\n")
    worker.stdin.flush()
    done = json.loads(worker.stdout.readline())
    assert done["wrong"] == []
    assert done["runs"] >= 5
