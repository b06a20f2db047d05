"""A run that meets its machine's limits says so once, in words, and loses nothing that was saved."""

import shutil
import subprocess
from pathlib import Path

from mixtral_run.weights.manifest.describe import describe_adapter
from tests.multiprocess.conftest import environment_of, mixtral_run
from tests.support.processes import commands, warm

RUN = ("finetune", "--device", "cpu", "--nproc-per-node", "2", "--mock-data")
LITTLE_MEMORY = """
import resource
from mixtral_run.cli.main import main
resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, 2 * 10**9))
main()
"""
TP2_EP2 = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2")


def reported_in_words(text: str, *, once: str) -> bool:
    return "Traceback" not in text and text.count(once) == 1 and "next:" in text


def test_memory_that_runs_out_in_a_step(small_checkpoint: Path, tmp_path: Path) -> None:
    """2,048 × 256 tokens take more than the 2 GB that each process may have. Longer rows take attention's time too."""
    size = ("--seq-length", "256", "--micro-batch-size", "2048", "--global-batch-size", "2048", "--train-iters", "1")
    words = (*RUN, *TP2_EP2, *size, "--load", str(small_checkpoint), "--save", str(tmp_path / "adapter"))
    done = warm.run(["-c", LITTLE_MEMORY, *words], environment_of())
    assert done.returncode == 6, done.stderr
    assert reported_in_words(done.stderr, once="This machine's memory is full"), done.stderr
    assert "--micro-batch-size" in done.stderr


def test_a_disk_that_fills_up_before_a_save(small_checkpoint: Path, mounted: Path) -> None:
    save, ballast = mounted / "adapter", mounted / "ballast"
    argv = [*RUN, *TP2_EP2, "--seq-length", "32", "--global-batch-size", "4", "--train-iters", "20"]
    argv += ["--save-interval", "10", "--load", str(small_checkpoint), "--save", str(save)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with commands.start(["-m", "mixtral_run", *argv], environment_of(), **streams) as run:
        assert run.stdout is not None and run.stderr is not None
        for line in run.stdout:
            if line.startswith("saved") and not ballast.exists():
                # Ten iterations before the next save; after the check that there is room.
                ballast.write_bytes(bytes(shutil.disk_usage(mounted).free - 65536))
        errors = run.stderr.read()
    assert run.returncode == 6, errors
    assert reported_in_words(errors, once="The adapter of iteration 20 cannot be saved"), errors
    assert describe_adapter(save).iteration == 10
    assert not list(save.glob(".iter_*"))
    ballast.unlink()
    # As if the disk had been full a moment earlier, among the tokenizer's files.
    (save / "tokenizer").rename(save / ".tokenizer.partial")
    (save / ".tokenizer.partial" / "tokenizer.json").write_text("{")
    done = mixtral_run(*argv, "--resume")
    assert done.returncode == 0, done.stderr
    assert describe_adapter(save).iteration == 20
    whole = (small_checkpoint / "tokenizer" / "tokenizer.json").read_bytes()
    assert (save / "tokenizer" / "tokenizer.json").read_bytes() == whole
    assert not (save / ".tokenizer.partial").exists()
