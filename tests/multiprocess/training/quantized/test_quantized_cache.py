"""Experts in 8 or 4 bit kept beside their base: taken where they are the base's and whole, else made again or left."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.load.read_parts import BLOCK_BYTES, default_workers
from mixtral_run.weights.manifest.checkpoint_folder import LATEST
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.quantized_cache import layout, write_experts
from tests.multiprocess.conftest import environment_of
from tests.support.processes import commands, warm
from tests.support.quantized_cache import (
    RECORD,
    STALE,
    Start,
    edit_record,
    flip,
    folder_of,
    leftovers,
    same,
    start,
    took,
    wipe_experts,
)
from tests.support.tiny import write_tiny


@pytest.mark.parametrize("precision", ["fp8", "nf4"])
@pytest.mark.parametrize("of", ["own_checkpoint", "own_hf_model"])
def test_the_next_start_reads_no_expert_of_the_base(of: str, precision: str, request: pytest.FixtureRequest) -> None:
    base = request.getfixturevalue(of)
    quantized = start(base, "no", precision)
    assert quantized.said == ""
    made = start(base, "yes", precision)
    assert "Writing the quantized cache" in made.said
    assert same(made, quantized)
    wipe_experts(base)
    for mode in ("yes", "use"):
        again = start(base, mode, precision)
        assert took(again)
        assert same(again, quantized)
    with pytest.raises((AssertionError, WeightsError)):
        # What was wiped is what a start without the folder reads.
        assert same(start(base, "no", precision), quantized)


def test_files_are_plain_safetensors(own_checkpoint: Path) -> None:
    made = start(own_checkpoint)
    record = json.loads((folder_of(own_checkpoint) / RECORD).read_text())
    assert record["kind"] == "quantised"
    assert record["base"]["fingerprint"] == describe_base(own_checkpoint).fingerprint == made.fingerprint
    names = []
    for layer in range(2):
        tensors = load_file(folder_of(own_checkpoint) / f"layer_{layer:02d}.safetensors")
        names += tensors
        for linear in ("linear_fc1", "linear_fc2"):
            for part in ("values", "scales"):
                stacked = made.experts[f"decoder.layers.{layer}.mlp.experts.{linear}.{part}"]
                for expert in range(8):
                    stored = tensors[f"layers.{layer}.experts.{expert}.{linear}.{part}"]
                    assert stored.dtype == stacked.dtype
                    assert torch.equal(stored.view(torch.uint8), stacked[expert].view(torch.uint8))
    assert sorted(record["tensors"]) == sorted(names)
    assert len(names) == 2 * 8 * 4


@pytest.mark.parametrize("what", STALE)
def test_a_stale_one_is_not_taken_and_is_made_again(own_checkpoint: Path, what: str) -> None:
    first = start(own_checkpoint)
    edit_record(own_checkpoint, STALE[what])
    # It would be noticed if these were taken.
    for file in folder_of(own_checkpoint).glob("*.safetensors"):
        flip(file, file.stat().st_size - 1)
    unused = start(own_checkpoint, "use")
    assert unused.said.count("is not used") == 1
    assert "Writing the quantized cache" not in unused.said
    assert same(unused, first)
    again = start(own_checkpoint)
    assert again.said.count("is not used") == 1
    assert "Writing the quantized cache" in again.said
    assert same(again, first)
    assert took(start(own_checkpoint))


def test_what_megatron_saved_since_is_another_base(own_checkpoint: Path) -> None:
    """Its iteration lies in the same folder and the record still says what was converted."""
    start(own_checkpoint)
    shutil.copytree(own_checkpoint / "iter_0000001", own_checkpoint / "iter_0000005")
    (own_checkpoint / LATEST).write_text("5\n")
    assert "the base's iteration changed since" in start(own_checkpoint).said


def test_an_hf_model_that_changed(own_hf_model: Path) -> None:
    first = start(own_hf_model)
    assert "-" in first.fingerprint
    weights = open_hf_weights(own_hf_model)
    file = weights.files[0]
    times = file.stat()
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    again = start(own_hf_model)
    assert "the base's files changed since" in again.said
    assert same(again, first)
    # Neither size nor time tells: what is read at every start does.
    times = file.stat()
    flip(file, weights.sources["model.embed_tokens.weight"].start)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    other = start(own_hf_model)
    assert "made of a base with fingerprint" in other.said
    assert other.fingerprint != first.fingerprint
    assert took(start(own_hf_model))


def test_in_another_dtype(own_checkpoint: Path) -> None:
    """fp32 weights rounded to bf16 first give other numbers in 8 bit."""
    first = start(own_checkpoint, dtype="fp32")
    rounded = start(own_checkpoint, dtype="bf16")
    assert "made as dtype float32, not bfloat16" in rounded.said
    assert not same(rounded, first)
    assert same(rounded, start(own_checkpoint, "no", dtype="bf16"))


def test_damage_is_found_while_reading(own_checkpoint: Path) -> None:
    first = start(own_checkpoint)
    file = folder_of(own_checkpoint) / "layer_01.safetensors"
    for do in (lambda: flip(file, file.stat().st_size - 5), lambda: os.truncate(file, 5000), file.unlink):
        do()
        again = start(own_checkpoint)
        assert "layer_01.safetensors" in again.said
        assert "is not used" in again.said
        assert same(again, first)
        assert took(start(own_checkpoint))
    flip(file, file.stat().st_size - 5)
    unused = start(own_checkpoint, "use")
    assert "damaged: layer_01.safetensors: layers.1.experts.7.linear_fc2.values" in unused.said
    assert same(unused, first)


def test_half_made_ones(own_checkpoint: Path) -> None:
    first = start(own_checkpoint, "no")
    left = own_checkpoint / ".quantised-fp8.unfinished-0123456789ab"
    left.mkdir()
    (left / "layer_00.safetensors").write_bytes(b"half")
    (own_checkpoint / ".quantised-fp8.lock").touch()
    made = start(own_checkpoint)
    assert same(made, first)
    assert leftovers(own_checkpoint) == []
    # Without its record it is none of ours: somebody else's files stay.
    (folder_of(own_checkpoint) / RECORD).unlink()
    again = start(own_checkpoint)
    assert again.said.count("!") == 2
    assert "does not write the quantized cache" in again.said
    assert "removed by hand" in again.said
    assert same(again, first)
    assert (folder_of(own_checkpoint) / "layer_00.safetensors").is_file()
    assert leftovers(own_checkpoint) == []


def test_another_run_is_keeping_them(own_checkpoint: Path) -> None:
    with (own_checkpoint / ".quantised-fp8.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = own_checkpoint / ".quantised-fp8.unfinished-0123456789ab"
        other.mkdir()
        mesh = start(own_checkpoint)
        assert "another run is writing them" in mesh.said
        assert "!" not in mesh.said
        assert other.is_dir()
        assert not folder_of(own_checkpoint).exists()
    assert "Writing the quantized cache" in start(own_checkpoint).said
    assert leftovers(own_checkpoint) == []


def test_missing_disk_space_is_reported_once(mounted: Path, small_checkpoint: Path) -> None:
    base = mounted / "base"
    shutil.copytree(small_checkpoint, base)
    done = start(base)
    assert done.said.count("!") == 1
    assert "GiB free" in done.said
    assert same(done, start(base, "no"))
    assert not folder_of(base).exists()
    assert leftovers(base) == []


def test_what_the_run_will_write_itself_stays_free(own_checkpoint: Path) -> None:
    done = start(own_checkpoint, reserve=2**60)
    assert "1,073,741,8" in done.said  # GiB
    assert not folder_of(own_checkpoint).exists()


def test_a_disk_that_cannot_be_written_to(mounted: Path, small_checkpoint: Path) -> None:
    base = mounted / "base"
    shutil.copytree(small_checkpoint, base)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    done = start(base)
    assert done.said.count("!") == 1
    assert "Read-only file system" in done.said
    assert same(done, start(base, "no"))


def test_a_disk_that_fails_meanwhile(own_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = start(own_checkpoint, "no")
    write, calls = os.pwrite, []

    def failing(descriptor: int, data: memoryview, position: int) -> int:
        calls.append(position)
        if len(calls) > 20:
            raise OSError(errno.EIO, "Input/output error")
        return write(descriptor, data, position)

    monkeypatch.setattr(write_experts.os, "pwrite", failing)
    done = start(own_checkpoint)
    assert 21 <= len(calls) < 21 + write_experts.num_threads()
    assert done.said.count("!") == 1
    assert "Input/output error" in done.said
    assert same(done, quantized)
    assert not folder_of(own_checkpoint).exists()
    assert leftovers(own_checkpoint) == []


def test_a_base_that_cannot_be_read_leaves_nothing(own_hf_model: Path) -> None:
    source = open_hf_weights(own_hf_model).sources["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    add = write_experts.Writer.add

    def then_cut(self: write_experts.Writer, layer: int, tensors: dict) -> None:
        add(self, layer, tensors)
        os.truncate(source.file, source.start)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write_experts.Writer, "add", then_cut)
        with pytest.raises(WeightsError, match="shorter"):
            start(own_hf_model)
    assert not folder_of(own_hf_model).exists()
    assert leftovers(own_hf_model) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from mixtral_run.weights.quantized_cache import write_experts, writer as keeping
from tests.support.quantized_cache import start

stage, base = sys.argv[1], Path(sys.argv[2])

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if stage == "writing":
    write = write_experts._write_tensor
    calls = []
    def some(*arguments):
        calls.append(1)
        return write(*arguments) if len(calls) < 20 else die()
    write_experts._write_tensor = some
elif stage == "record":
    keeping.write_manifest = die
else:
    keeping.sync_path = die
start(base)
"""


@pytest.mark.parametrize("stage", ["writing", "record", "rename"])
def test_a_run_that_is_killed(own_checkpoint: Path, stage: str) -> None:
    done = warm.run(["-c", KILLED, stage, str(own_checkpoint)], environment_of())
    assert done.returncode == -signal.SIGKILL
    assert not folder_of(own_checkpoint).exists()
    assert len(leftovers(own_checkpoint)) == 2
    assert start(own_checkpoint, "use").said == ""
    again = start(own_checkpoint)
    assert "Writing the quantized cache" in again.said
    assert same(again, start(own_checkpoint, "no"))
    assert leftovers(own_checkpoint) == []


AT_ONCE = """
import sys, time
from pathlib import Path
from tests.support.quantized_cache import start
import torch
base, out, go = map(Path, sys.argv[1:])
out.with_suffix(".ready").touch()
while not go.exists():
    time.sleep(0.001)
done = start(base)
torch.save((done.experts, done.fingerprint, done.said), out)
"""


def test_runs_that_start_at_once(own_checkpoint: Path, tmp_path: Path) -> None:
    quantized = start(own_checkpoint, "no")
    go, outs = tmp_path / "go", [tmp_path / f"out{number}.pt" for number in range(4)]
    runs = [commands.start(["-c", AT_ONCE, str(own_checkpoint), str(out), str(go)], environment_of()) for out in outs]
    until = time.monotonic() + 120
    while not all(out.with_suffix(".ready").exists() for out in outs):
        assert time.monotonic() < until and all(run.poll() is None for run in runs)
        time.sleep(0.02)
    go.touch()
    assert [run.wait(timeout=300) for run in runs] == [0] * len(runs)
    said = []
    for out in outs:
        experts, fingerprint, words = torch.load(out)
        assert same(Start(experts, fingerprint, words), quantized)
        said.append(words)
    assert sum("Writing the quantized cache" in words for words in said) == 1
    assert not any("!" in words for words in said)
    assert leftovers(own_checkpoint) == []
    after = start(own_checkpoint)
    assert took(after)
    assert same(after, quantized)


def test_converting_again_takes_it_away(own_checkpoint: Path, small_hf_model: Path, mounted: Path) -> None:
    """Return True if the folder is replaced; a mount point is cleared instead."""
    start(own_checkpoint)
    shutil.copytree(own_checkpoint, mounted, dirs_exist_ok=True)
    for folder in (own_checkpoint, mounted):
        assert folder_of(folder).is_dir()
        convert(ConvertConfig(hf_model_path=str(small_hf_model), output_path=folder, overwrite=True), Report.silent())
        assert not folder_of(folder).exists()


def test_files_of_mixtral_8x7b() -> None:
    """45 GB in 8 bit, 24 in 4, every tensor aligned to its numbers."""
    for precision, expected in (("fp8", 45.1e9), ("nf4", 24.0e9)):
        files = layout.Files(Path("x"), MIXTRAL_8X7B, precision)
        assert files.num_bytes == pytest.approx(expected, rel=0.01)
        for entry in files.entries(31).values():
            assert entry.start % {"F32": 4, "BF16": 2}.get(entry.dtype, 1) == 0


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.config.verbs.weights import VerifyConfig
from mixtral_run.model.mixtral import ModelSettings, build_model
from mixtral_run.model.adapters.lora_settings import LoraSettings
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.train.checkpoints.checkpoint import load_base
from mixtral_run.train.quantized_experts import CacheOptions

base = describe_base(Path(sys.argv[1]))

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

with open_mesh(VerifyConfig(load=base.folder, device="cpu")) as here:
    for mode in ("yes", "use", "use"):  # the second takes what threads and libraries take once
        settings = ModelSettings(torch.float32, True, LoraSettings(4, 8.0, 0.0, ("linear_qkv",), 1), "none", "fp8")
        model = build_model(base.architecture, settings, here)
        before, peak, done = anonymous(), [0], threading.Event()

        def watch():
            while not done.wait(0.001):
                peak[0] = max(peak[0], anonymous())

        watching = threading.Thread(target=watch)
        watching.start()
        load_base(model, base, CacheOptions(mode))
        done.set()
        watching.join()
        own = sum(each.nbytes for each in [*model.parameters(), *model.buffers()])
    print(peak[0] - before, own, base.weights.num_bytes)
"""


def test_memory_is_the_experts_own_and_a_bounded_buffer(tmp_path: Path) -> None:
    write_tiny(tmp_path / "hf", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "hf")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    taken, own, in_full = map(int, done.stdout.split())
    # Each thread's staging buffer, and the allocator's own on top.
    allowed = own + default_workers() * 2 * BLOCK_BYTES + 8 * 2**20
    assert taken < allowed < in_full / 1.5
