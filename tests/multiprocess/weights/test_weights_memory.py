"""The memory of conversion, verification and conversion back does not grow with the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.tiny import write_tiny

# Each step is done with a small model first: what libraries take once is there when the large one comes.
STEPS = """
import sys, threading
from pathlib import Path
from mixtral_run.config.verbs.weights import ConvertConfig, VerifyConfig
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.convert.to_hf import to_hf
from mixtral_run.weights.verify.verify import verify

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def steps(folder):
    hf, out, again = folder / "hf", folder / "out", folder / "again"
    yield "convert", lambda: convert(ConvertConfig(hf_model_path=str(hf), output_path=out, workers=2), Report.silent())
    yield "against", lambda: verify(VerifyConfig(load=out, against=hf), Report.silent()).check()
    yield "proof", lambda: verify(VerifyConfig(load=out, proof=True), Report.silent()).check()
    yield "back", lambda: to_hf(ConvertConfig(from_megatron=out, output_path=again), Report.silent())

def peak_of(work):
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return max(0, peak[0] - before)

small, large = (steps(Path(word)) for word in sys.argv[1:])
for (_, first), (name, second) in zip(small, large):
    first()
    print(name, peak_of(second))
"""


def test_it_is_a_few_blocks(tmp_path: Path) -> None:
    write_tiny(tmp_path / "small" / "hf")
    tensors = write_tiny(tmp_path / "large" / "hf", num_shards=1, vocab_size=500_000)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", STEPS, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        check=False,
        # Else the C library keeps an arena a thread and core.
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )
    assert done.returncode == 0, done.stderr
    taken = {name: int(grown) for name, grown in (line.split() for line in done.stdout.splitlines())}
    assert set(taken) == {"convert", "against", "proof", "back"}
    for name, grown in taken.items():
        assert grown < num_bytes / 2, (name, f"{grown:,} of {num_bytes:,} bytes")
