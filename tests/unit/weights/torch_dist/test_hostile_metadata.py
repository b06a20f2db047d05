"""A `.metadata` file from anybody changes nothing in the process, names no file elsewhere and ends soon."""

from __future__ import annotations

import io
import pathlib
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from mixtral_run.errors import WeightsError
from mixtral_run.weights.torch_dist.checkpoint_reader import Reader
from mixtral_run.weights.torch_dist.chunk_grid import are_disjoint_within
from mixtral_run.weights.torch_dist.metadata import METADATA_NAME, StoredItem, read_metadata, write_metadata
from mixtral_run.weights.torch_dist.restricted_pickle import DisallowedGlobalError, UnpicklingError, load_metadata


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def setting(owner: str, name: str) -> bytes:
    """Return a pickle that sets an attribute of a global by the second half of BUILD's state."""
    module, _, called = owner.rpartition(".")
    return f"\x80\x02c{module}\n{called}\nN}}".encode("latin-1") + text(name) + text("changed") + b"s\x86b."


OWNERS = [
    "pathlib.PosixPath",
    "torch.distributed.checkpoint.metadata.MetadataIndex",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.Size",
    "collections.OrderedDict",
    "megatron.core.Anything",
    "builtins.getattr",
]


@pytest.mark.parametrize("owner", OWNERS)
def test_no_class_or_function_is_changed(owner: str) -> None:
    with pytest.raises(DisallowedGlobalError, match="setattr"):
        load_metadata(io.BytesIO(setting(owner, "changed_by_a_pickle")))
    assert not hasattr(pathlib.PosixPath, "changed_by_a_pickle")
    assert not hasattr(MetadataIndex, "changed_by_a_pickle")
    assert not hasattr(torch.serialization._get_layout, "changed_by_a_pickle")


def test_no_member_of_an_enum_is_changed() -> None:
    from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as ENCODING

    stream = b"\x80\x02ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\nK\x00\x85R}"
    with pytest.raises(DisallowedGlobalError, match="setattr"):
        load_metadata(io.BytesIO(stream + text("_name_") + text("changed") + b"sb."))
    assert ENCODING(0).name == "TORCH_CONTIGUOUS_FORMAT"


def doubled(count: int) -> bytes:
    """Return instructions that make a tuple whose hash and text take 2**count steps."""
    return b"K\x01" + b"2\x86" * count


INDEX = b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n"
ENCODING = b"ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
SLOW = {
    "a key": b"}" + doubled(40) + b"Ns",
    "a member of a set": b"cbuiltins\nset\n]" + doubled(40) + b"a\x85R",
    "a key's name": b"}" + INDEX + b"K\x01" + b"2\x86" * 6 + b"\x85RNs",
    "the value of an enum": ENCODING + doubled(40) + b"\x85R",
}


def test_what_takes_exponential_time_and_deep_tuples_are_refused() -> None:
    """Run in a process of its own, so that a failure is not a hang or a crash."""
    streams = [b"\x80\x02" + each + b"." for each in SLOW.values()] + [b"\x80\x02}N" + b"\x85" * 2_000_000 + b"Ns."]
    code = (
        "import io, pickle, sys\n"
        "from mixtral_run.weights.torch_dist.restricted_pickle import UnpicklingError, load_metadata\n"
        "for stream in pickle.load(sys.stdin.buffer):\n"
        "    try: load_metadata(io.BytesIO(stream))\n"
        "    except UnpicklingError: print('refused', flush=True)\n"
        "    else: print('taken', flush=True)\n"
    )
    words, given = [sys.executable, "-c", code], pickle.dumps(streams)
    done = subprocess.run(words, input=given, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()[-500:]
    assert dict(zip([*SLOW, "deep tuples"], done.stdout.decode().split(), strict=True)) == dict.fromkeys(
        [*SLOW, "deep tuples"], "refused"
    )


def test_a_file_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_run.weights.torch_dist.restricted_pickle._MOST_BYTES", 100)
    with pytest.raises(UnpicklingError, match="larger than 100 bytes"):
        load_metadata(io.BytesIO(b"\x80\x02N" + b"0N" * 100 + b"."))


@pytest.mark.parametrize(("protocol", "count"), [(3, 10), (4, 10), (5, 1000)])
def test_what_torch_writes_is_read_unchanged_and_soon(tmp_path: Path, protocol: int, count: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {
        f"decoder.layers.mlp.experts.weight{number}": (32, 8, 16, 4) for number in range(count)
    }
    items = [
        StoredItem(key, (layer, 0, 0, 0), (4, 8, 16, 4), "__0_0.distcp", layer * 100, 100)
        for key in shapes
        for layer in range(0, 32, 4)
    ]
    write_metadata(tmp_path / METADATA_NAME, shapes, "bfloat16", items)
    written = pickle.loads((tmp_path / METADATA_NAME).read_bytes())
    written.planner_data = {"a": ("b", 0), "c": {"d": [1, 2.0, None], "e": {3, 4}}}
    written.storage_meta.checkpoint_id = pathlib.PosixPath("/srv/a")
    (tmp_path / METADATA_NAME).write_bytes(pickle.dumps(written, protocol))
    began = time.process_time()
    read = read_metadata(tmp_path)
    assert time.process_time() - began < 3
    assert read == written
    assert [type(each) for each in read.storage_data.values()] == [_StorageInfo] * len(items)


def checkpoint(folder: Path, metadata: Metadata) -> Path:
    (folder / "it").mkdir()
    (folder / "it" / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    stream = io.BytesIO()
    torch.save(torch.zeros(2, 2), stream)
    for name in (folder / "outside.distcp", folder / "it" / "own.distcp"):
        name.write_bytes(stream.getvalue())
    return folder / "it"


def metadata_of(*chunks: tuple[int, int], shape: tuple[int, int] = (2, 2), dtype: object = torch.float32) -> Metadata:
    """Return the metadata of a tensor k that is stored in chunks of 2 x 2 at these offsets."""
    stored = [ChunkStorageMetadata(torch.Size(each), torch.Size((2, 2))) for each in chunks]
    tensor = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), stored)  # type: ignore[arg-type]
    places = {MetadataIndex("k", each): _StorageInfo("own.distcp", 0, 1) for each in chunks}
    return Metadata({"k": tensor}, storage_data=places)


def opened(folder: Path) -> Reader:
    with Reader(folder) as reader:
        return reader


def test_no_place_hides_behind_another(tmp_path: Path) -> None:
    """torch reads the first place; the second one, equal as a tuple, must not be checked in its stead."""
    metadata = metadata_of((0, 0))
    metadata.storage_data[MetadataIndex("k", (0, 0))].relative_path = "../outside.distcp"
    twin = MetadataIndex("k", None)
    object.__setattr__(twin, "offset", b"\0\0")
    metadata.storage_data[twin] = _StorageInfo("own.distcp", 0, 1)
    with pytest.raises(WeightsError, match="not a whole number"):
        opened(checkpoint(tmp_path, metadata))


def test_a_place_that_no_tensor_uses_is_checked(tmp_path: Path) -> None:
    metadata = metadata_of((0, 0))
    metadata.storage_data[MetadataIndex("other", (0, 0))] = _StorageInfo("../outside.distcp", 0, 1)
    with pytest.raises(WeightsError, match="not a file of this folder"):
        opened(checkpoint(tmp_path, metadata))


def test_a_dtype_is_one_of_torch(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="dtype of k"):
        opened(checkpoint(tmp_path, metadata_of((0, 0), dtype=((1, 2), 3))))


def test_a_plain_checkpoint_is_read(tmp_path: Path) -> None:
    assert opened(checkpoint(tmp_path, metadata_of((0, 0), (2, 0), shape=(4, 2)))).num_chunks == 2


@pytest.mark.parametrize("chunks", [[(0, 0), (0, 0)], [(0, 0), (1, 0)], [(1, 0), (3, 0)]])
def test_chunks_that_overlap_beside_a_hole_are_refused(tmp_path: Path, chunks: list[tuple[int, int]]) -> None:
    with pytest.raises(WeightsError, match="overlap"):
        opened(checkpoint(tmp_path, metadata_of(*chunks, shape=(4, 2))))


def test_many_chunks_are_compared_soon() -> None:
    boxes = [((a, b, c, 0), (1, 1, 4, 8)) for a in range(32) for b in range(8) for c in range(0, 32, 4)]
    began = time.process_time()
    assert are_disjoint_within((32, 8, 32, 8), boxes)
    assert not are_disjoint_within((32, 8, 32, 8), [*boxes, ((31, 7, 30, 7), (1, 1, 1, 1))])
    assert time.process_time() - began < 2


def test_no_control_character_of_a_pickle_reaches_the_terminal(tmp_path: Path) -> None:
    with pytest.raises(DisallowedGlobalError) as named:
        load_metadata(io.BytesIO(b"\x80\x03cevil\n\x1b[2J\n."))
    assert "evil" in str(named.value) and "\x1b" not in str(named.value) + named.value.name
    for place in ("file", "key"):
        (tmp_path / place).mkdir()
        metadata = metadata_of((0, 0))
        if place == "file":
            metadata.storage_data[MetadataIndex("k", (0, 0))].relative_path = "\x1b[2J"
        else:
            metadata.state_dict_metadata["\x1b[2J"] = metadata.state_dict_metadata.pop("k")
        with pytest.raises(WeightsError, match=r"not a (file of this folder|printable text)") as caught:
            opened(checkpoint(tmp_path / place, metadata))
        assert "\x1b" not in str(caught.value)
