"""A checkpoint's tensors in whatever layout and framing they were saved, as the parts of any other layout."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mixtral_run.errors import WeightsError
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.load import read_parts
from mixtral_run.weights.load.read_parts import Target
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.mapping import hf_to_megatron
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.item_writer import PAGE
from mixtral_run.weights.torch_dist.metadata import METADATA_NAME, StoredItem, write_metadata
from tests.multiprocess.conftest import mixtral_run, torchrun
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.support.tiny import write_tiny

INTEGRATION = Path(__file__).parent
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 4), (4, 8))
FC1_KEY = "decoder.layers.mlp.experts.experts.linear_fc1.weight"


def parts_of(hf: Path, tp: int, ep: int, dtype: torch.dtype) -> list[Target]:
    """Return the tensors of all ranks of a layout, not filled."""
    units = hf_to_megatron.units(open_hf_weights(hf).architecture, tp, ep)
    chunks = [chunk for unit in units for chunk in unit.chunks]
    return [Target(c.key, c.offset, c.shape, torch.full(c.shape, float("nan"), dtype=dtype)) for c in chunks]


def from_hf(hf: Path, tp: int, ep: int, dtype: torch.dtype = torch.float32) -> list[Target]:
    targets = parts_of(hf, tp, ep, dtype)
    read_parts.read_into(open_hf_weights(hf), targets, workers=2)
    return targets


def unequal(found: list[Target], expected: list[Target], factor: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    pairs = zip(found, expected, strict=True)
    return [(a.key, a.offset) for a, b in pairs if not torch.equal(a.data, b.data * factor)]


def filled(folder: Path, targets: list[Target]) -> tuple[list[Target], int]:
    """The targets, and how many bytes were read into them without torch."""
    read: list[int] = []
    with Reader(folder) as reader:
        fill(reader, targets, workers=2, advance=read.append)
    return targets, sum(read)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resharding") / "hf"
    write_tiny(folder)
    return folder


@pytest.mark.parametrize("stored", LAYOUTS)
def test_any_layout_into_any_other(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: tuple[int, int]
) -> None:
    """In small blocks, so that every matrix takes several."""
    monkeypatch.setattr(read_parts, "PART_BYTES", 3000)
    monkeypatch.setattr(read_parts, "BLOCK_BYTES", 700)
    convert_quietly(hf, tmp_path / "base", *stored)
    num_bytes = open_hf_weights(hf).num_bytes
    for layout in LAYOUTS:
        found, read = filled(tmp_path / "base" / "iter_0000001", parts_of(hf, *layout, torch.float32))
        assert unequal(found, from_hf(hf, *layout)) == [], layout
        # Each byte once, but for columns: rows are read whole, by each rank that has some of their columns.
        assert read == num_bytes if stored[0] >= layout[0] else num_bytes < read < 1.5 * num_bytes


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_dtypes_are_rounded_as_from_an_hf_directory(tmp_path: Path, stored: torch.dtype, dtype: torch.dtype) -> None:
    write_tiny(tmp_path / "hf", dtype=stored)
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    found, _ = filled(tmp_path / "base" / "iter_0000001", parts_of(tmp_path / "hf", 1, 2, dtype))
    assert unequal(found, from_hf(tmp_path / "hf", 1, 2, dtype)) == []


def saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


def deflated(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as old, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return stream.getvalue()


def wider(tensor: torch.Tensor) -> bytes:
    return saved(tensor.double())


def strided(tensor: torch.Tensor) -> bytes:
    return saved(tensor.mT.contiguous().mT if tensor.dim() > 1 else torch.stack([tensor, tensor], 1)[:, 0])


def second_half(tensor: torch.Tensor) -> bytes:
    return saved(torch.cat([tensor * 0, tensor])[tensor.shape[0] :])


def framed_anew(source: Path, out: Path, frame: Callable[[torch.Tensor], bytes]) -> None:
    """The same chunks of the same tensors, as another writer frames them."""
    out.mkdir()
    items = []
    with Reader(source) as reader:
        for key in reader.tensors:
            for item in reader.chunks(key):
                assert item.shape is not None
                data = bytearray(b"".join(reader.payload(item, 2**20)))
                tensor = torch.frombuffer(data, dtype=torch.float32).view(item.shape)
                with (out / item.file).open("ab") as stream:
                    start, framed = stream.tell(), frame(tensor)
                    stream.write(framed)
                items.append(StoredItem(key, item.offset, item.shape, item.file, start, len(framed)))
        shapes = {key: info.shape for key, info in reader.tensors.items()}
    write_metadata(out / METADATA_NAME, shapes, "float32", items)


@pytest.mark.parametrize(
    ("frame", "plain"), [(saved, True), (deflated, False), (wider, False), (strided, False), (second_half, False)]
)
def test_whatever_torch_reads_is_read(
    hf: Path, tmp_path: Path, frame: Callable[[torch.Tensor], bytes], plain: bool
) -> None:
    convert_quietly(hf, tmp_path / "base", 2, 4)
    framed_anew(tmp_path / "base" / "iter_0000001", tmp_path / "other", frame)
    found, read = filled(tmp_path / "other", parts_of(hf, 1, 2, torch.float32))
    assert unequal(found, from_hf(hf, 1, 2)) == []
    num_bytes = open_hf_weights(hf).num_bytes
    if plain:
        assert read == num_bytes
    else:  # but for tensors of one row, which are contiguous whatever their stride
        assert read < num_bytes / 50


@pytest.mark.parametrize("writer", ["pipeline stages", "trained elsewhere"])
def test_what_megatron_core_saved(hf: Path, tmp_path: Path, writer: str) -> None:
    """Into another layout, without torch's reader; beside the weights lie the optimizer's state and `_extra_state`."""
    convert_quietly(hf, tmp_path / "base", 2, 4)
    written = tmp_path / "written"
    written.mkdir()
    paths = (str(tmp_path / "base" / "iter_0000001"), str(written))
    if writer == "pipeline stages":
        torchrun(2, INTEGRATION / "pipeline_worker.py", *paths)
        factor = 1
    else:
        torchrun(2, INTEGRATION / "trained_elsewhere_worker.py", *paths, "te")
        factor = 2
    found, read = filled(written, parts_of(hf, 2, 4, torch.float32))
    assert unequal(found, from_hf(hf, 2, 4), factor) == []
    assert read >= open_hf_weights(hf).num_bytes


def test_a_part_that_reaches_beyond_the_stored_tensor(hf: Path, tmp_path: Path) -> None:
    """A vocabulary padded in the model and not in the checkpoint."""
    convert_quietly(hf, tmp_path / "base", 2, 4)
    with Reader(tmp_path / "base" / "iter_0000001") as reader:
        rows, columns = reader.tensors[hf_to_megatron.EMBEDDING_KEY].shape
        target = Target(hf_to_megatron.EMBEDDING_KEY, (rows - 4, 0), (10, columns), torch.zeros(10, columns))
        fill(reader, [target])
        whole = Target(hf_to_megatron.EMBEDDING_KEY, (0, 0), (rows, columns), torch.zeros(rows, columns))
        fill(reader, [whole])
    assert torch.equal(target.data[:4], whole.data[-4:])
    assert not target.data[4:].any()


def test_all_tensors_that_the_checkpoint_lacks_are_reported(hf: Path, tmp_path: Path) -> None:
    convert_quietly(hf, tmp_path / "base", 2, 4)
    targets = [
        Target("decoder.layers.mlp.shared_experts.weight", (0, 0), (2, 2), torch.zeros(2, 2)),
        Target(hf_to_megatron.EMBEDDING_KEY, (0, 0, 0), (1, 2, 2), torch.zeros(1, 2, 2)),
    ]
    with pytest.raises(WeightsError) as caught:
        filled(tmp_path / "base" / "iter_0000001", targets)
    assert "decoder.layers.mlp.shared_experts.weight: missing" in str(caught.value)
    assert f"{hf_to_megatron.EMBEDDING_KEY}: expected 3 axes" in str(caught.value)


def item_at(folder: Path, key: str, offset: tuple[int, ...]) -> StoredItem:
    with Reader(folder) as reader:
        return next(item for item in reader.chunks(key) if item.offset == offset)


@pytest.mark.parametrize("kept", [100, PAGE + 100])
def test_a_file_that_ends_early_once_it_was_opened(hf: Path, tmp_path: Path, kept: int) -> None:
    """Within the framing, and within the bytes."""
    convert_quietly(hf, tmp_path / "base", 2, 4)
    folder = tmp_path / "base" / "iter_0000001"
    item = item_at(folder, FC1_KEY, (1, 7, 0, 0))
    with Reader(folder) as reader:
        os.truncate(folder / item.file, item.start + kept)
        with pytest.raises(WeightsError) as caught:
            fill(reader, parts_of(hf, 1, 1, torch.float32), workers=2)
    assert item.file in str(caught.value)


def start_of(load: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return mixtral_run(
        *("finetune", "--load", str(load), "--save", str(load.with_name("adapter")), "--mock-data", "--device", "cpu"),
        *("--tensor-model-parallel-size", "1", "--expert-model-parallel-size", "2", "--nproc-per-node", "2", *more),
    )


def test_a_file_that_is_short_or_missing_is_named(hf: Path, tmp_path: Path) -> None:
    convert_quietly(hf, tmp_path / "base", 2, 4)
    first, second = sorted((tmp_path / "base" / "iter_0000001").glob("*.distcp"))[:2]
    first.unlink()
    size = second.stat().st_size
    os.truncate(second, size - 5)
    done = start_of(tmp_path / "base")
    assert done.returncode == WeightsError.exit_code, done.stderr
    assert f"{first.name}: missing" in done.stderr
    assert f"{second.name}: truncated: expected {size:,} bytes; found {size - 5:,}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_damage_found_by_one_rank_is_reported_by_all(hf: Path, tmp_path: Path, precision: str) -> None:
    """The head of a chunk that the second of two ranks alone reads."""
    convert_quietly(hf, tmp_path / "base", 2, 4)
    item = item_at(tmp_path / "base" / "iter_0000001", FC1_KEY, (1, 7, 0, 0))
    with (tmp_path / "base" / "iter_0000001" / item.file).open("r+b") as stream:
        stream.seek(item.start)
        stream.write(b"\xff" * PAGE)
    done = start_of(tmp_path / "base", "--base-precision", precision)
    assert done.returncode == WeightsError.exit_code, done.stderr
    assert f"{item.file}, bytes {item.start:,} to" in done.stderr
    assert "Traceback" not in done.stderr


MEMORY = """
import sys, threading
from pathlib import Path
import torch
from mixtral_run.weights.mapping import hf_to_megatron as mapping
from mixtral_run.weights.load.reshard import fill
from mixtral_run.weights.load.read_parts import Target
from mixtral_run.weights.hf.hf_weights import open_hf_weights
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader

architecture, dtype = open_hf_weights(Path(sys.argv[1])).architecture, getattr(torch, sys.argv[3])

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

chunks = [chunk for unit in mapping.units(architecture) for chunk in unit.chunks]
targets = [Target(c.key, c.offset, c.shape, torch.ones(c.shape, dtype=dtype)) for c in chunks]  # in memory from here on
with Reader(Path(sys.argv[2])) as reader:
    fill(reader, targets[:1], workers=2)  # what threads and libraries take once
    before, peak, done = anonymous(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watching = threading.Thread(target=watch)
    watching.start()
    read = []
    fill(reader, targets, workers=2, advance=read.append)
    done.set()
    watching.join()
print(sum(read), peak[0] - before)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_the_parameters_and_a_bounded_buffer(tmp_path: Path, dtype: str) -> None:
    """From another layout, as they are stored and rounded on the way."""
    tensors = write_tiny(tmp_path / "hf", num_shards=1, vocab_size=200_000)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    convert_quietly(tmp_path / "hf", tmp_path / "base", 2, 4)
    paths = (str(tmp_path / "hf"), str(tmp_path / "base" / "iter_0000001"))
    done = subprocess.run([sys.executable, "-c", MEMORY, *paths, dtype], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read, taken = map(int, done.stdout.split())
    assert read == num_bytes
    allowed = 2 * 3 * read_parts.BLOCK_BYTES + 8 * 2**20
    assert taken < allowed < num_bytes / 4
    shutil.rmtree(tmp_path / "base")
