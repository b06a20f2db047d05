"""Merged files: every tensor is the source's, or its sum with scale · B·A computed here; all other bytes stay."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_run.errors import WeightsError
from mixtral_run.weights.adapter import merge
from mixtral_run.weights.adapter.merge import merge_files, row_blocks
from mixtral_run.weights.adapter.merge_journal import MERGE_JOURNAL, MergeJournal, identity
from mixtral_run.weights.hf.hf_weights import HFWeights, open_hf_weights
from tests.support.tiny import write_tiny
from tests.unit.weights.adapter.tiny_factors import TINY, Held

CONFIG = {
    "hidden_size": 8, "intermediate_size": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
    "num_local_experts": 3, "vocab_size": 10, "max_position_embeddings": 64,
}  # fmt: skip
ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


@pytest.fixture
def source(tmp_path: Path) -> tuple[HFWeights, dict[str, torch.Tensor]]:
    tensors = write_tiny(tmp_path / "hf", dtype=torch.bfloat16, num_shards=2, **CONFIG)
    # A tensor of no model in the last file, which stays.
    file = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    extra = {**load_file(file), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.arange(3.0)}
    save_file(extra, file, metadata={"format": "pt", "note": "kept"})
    weights = open_hf_weights(tmp_path / "hf")
    assert weights.architecture == TINY
    return weights, tensors


@pytest.mark.parametrize("block_bytes", [1, 40, 2**20])
def test_every_tensor_of_every_file(
    source: tuple[HFWeights, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    weights, tensors = source
    monkeypatch.setattr(merge, "BLOCK_BYTES", block_bytes)
    also = {"model.norm.weight": torch.randn(8), "model.layers.0.block_sparse_moe.gate.weight": torch.randn(3, 8)}
    factors = Held(dict.fromkeys(ALL[:3], 2), dict.fromkeys(ALL[:3], 1.5), also=also)
    out = tmp_path / "out"
    out.mkdir()
    journal = MergeJournal(out, "wanted")
    journal.start()
    steps: list[int] = []
    crcs = merge_files(weights, factors, out, journal, steps.append)
    assert sum(steps) == sum(each.nbytes for each in tensors.values())
    # The checksums are those of the source, which tell its fingerprint.
    assert crcs == {name: zlib.crc32(each.view(torch.int16).numpy().tobytes()) for name, each in tensors.items()}
    for file in weights.files:
        old, new = load_file(file), load_file(out / file.name)
        assert set(old) == set(new)
        assert (out / file.name).stat().st_size == file.stat().st_size
        for name, before in old.items():
            if name in also:
                expected = also[name].to(torch.bfloat16)
            elif name in factors.places:
                expected = (before.float() + factors.added(name)).to(torch.bfloat16)
                assert not torch.equal(expected, before)
            else:
                expected = before
            torch.testing.assert_close(new[name], expected, atol=2e-2, rtol=1e-2, msg=name)
            if name not in factors.places:
                assert torch.equal(new[name], expected), name
        head = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (out / file.name).read_bytes()[:head] == file.read_bytes()[:head]
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (weights.directory / index).read_bytes()


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "BLOCK_BYTES", 100)
    assert list(row_blocks(7, 33)) == [(0, 3), (3, 6), (6, 7)]
    assert list(row_blocks(6, 50)) == [(0, 2), (2, 4), (4, 6)]
    assert list(row_blocks(2, 101)) == [(0, 1), (1, 2)]
    assert list(row_blocks(0, 10)) == []


def test_finished_files_are_not_written_again(
    source: tuple[HFWeights, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    weights, tensors = source
    factors = Held({"linear_proj": 2}, {"linear_proj": 1.0})
    (tmp_path / "out").mkdir()
    journal = MergeJournal(tmp_path / "out", "wanted")
    journal.start()
    crcs = merge_files(weights, factors, tmp_path / "out", journal, lambda _: None)
    first = tmp_path / "out" / weights.files[0].name
    times = first.stat().st_mtime_ns
    second = tmp_path / "out" / weights.files[1].name
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + b"x")
    steps: list[int] = []
    again = merge_files(weights, factors, tmp_path / "out", MergeJournal(tmp_path / "out", "wanted"), steps.append)
    assert again == crcs and sum(steps) == sum(each.nbytes for each in tensors.values())
    assert first.stat().st_mtime_ns == times and second.read_bytes() == whole


def test_an_error_of_the_disk_names_both_files(
    source: tuple[HFWeights, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    weights, _ = source
    factors = Held({"linear_proj": 2}, {"linear_proj": 1.0})
    missing = tmp_path / "missing" / "out"
    with pytest.raises(WeightsError) as caught:
        merge_files(weights, factors, missing, MergeJournal(tmp_path, "w"), lambda _: None)
    name = weights.files[0].name
    assert caught.value.where == f"{weights.files[0]} → {missing / name}"
    assert caught.value.found == "No such file or directory"
    assert caught.value.next_command == f"df -h {tmp_path / 'missing'}, then the same command again"


def test_a_journal_is_believed_line_by_line(tmp_path: Path) -> None:
    journal = MergeJournal(tmp_path, "one")
    assert journal.is_new and not journal.has_files
    journal.start()
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode() * 3)
        journal.add(name, {"x": 1, "y": 2})
    assert journal.has_files
    assert journal.finished("a", ["y", "x"]) == {"x": 1, "y": 2}
    path = tmp_path / MERGE_JOURNAL
    lines = path.read_text().splitlines(keepends=True)
    expected = [{"identity": "one"}, *({"file": n, "crc32": zlib.crc32(n.encode() * 3), "sources": {"x": 1, "y": 2}}
                                       for n in "ab")]  # fmt: skip
    assert [json.loads(line[9:]) for line in lines] == expected
    assert [line[:9] for line in lines] == [f"{zlib.crc32(line[9:-1].encode()):08x} " for line in lines]

    again = MergeJournal(tmp_path, "one")
    again.start()
    assert not again.is_new and again.has_files and path.read_text() == "".join(lines)
    assert again.finished("b", ["x", "y"]) == {"x": 1, "y": 2}
    for name, sources in (("c", ["x", "y"]), ("a", ["x"]), ("a", ["x", "y", "z"])):
        assert again.finished(name, sources) is None
    (tmp_path / "b").write_bytes(b"bbB")
    assert again.finished("b", ["x", "y"]) is None
    (tmp_path / "b").unlink()
    assert again.finished("b", ["x", "y"]) is None
    # Another merge; and a line that is cut off, or damaged, with all that follow it.
    other = MergeJournal(tmp_path, "two")
    assert other.is_new and not other.has_files and other.finished("a", ["x", "y"]) is None
    path.write_text("".join(lines)[:-1])
    cut = MergeJournal(tmp_path, "one")
    assert cut.finished("a", ["x", "y"]) and cut.finished("b", ["x", "y"]) is None
    path.write_text(lines[0] + lines[1].replace('"x": 1', '"x": 3') + lines[2])
    assert not MergeJournal(tmp_path, "one").has_files
    path.write_text("")
    assert MergeJournal(tmp_path, "one").is_new


def test_what_makes_two_merges_the_same(source: tuple[HFWeights, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    weights, _ = source
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mixtral_run.json").write_text(name)
    one, two = (0.5, tmp_path / "one"), (0.5, tmp_path / "two")
    found = {
        "one": identity(weights, [one]),
        "two": identity(weights, [two]),
        "both": identity(weights, [one, two]),
        "weighted": identity(weights, [(0.25, tmp_path / "one")]),
    }
    assert found["one"] == identity(weights, [one])
    weights.files[0].touch()
    found["touched"] = identity(weights, [one])
    assert len(set(found.values())) == 5 and {len(each) for each in found.values()} == {64}
