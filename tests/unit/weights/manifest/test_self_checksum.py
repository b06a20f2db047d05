"""Every flipped bit of an adapter's manifest is found, and so is a value of another form in the state of its run."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.errors import WeightsError
from mixtral_run.weights.manifest.manifest import AdapterManifest, read_manifest, write_manifest
from mixtral_run.weights.manifest.run_state import FilePrefix, RunState
from tests.unit.train.checkpoints.test_run_folder import ARCHITECTURE, LORA

STATE = RunState(5, 1, (1.5, 2.0), 1.25, {"metrics.jsonl": FilePrefix(100, "0123abcd")})


def write(folder: Path, **more: Any) -> Path:
    values: dict[str, Any] = {
        "architecture": ARCHITECTURE, "iteration": 5, "lora": LORA, "base": {"fingerprint": "0-0"},
        "state": STATE.to_mapping(), "tokenizer_files": {}, "files": {"common.pt": "00000001"}, **more,
    }  # fmt: skip
    write_manifest(folder, "adapter", **values)
    return folder / "mixtral_run.json"


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    file = write(tmp_path)
    manifest = read_manifest(tmp_path, AdapterManifest)
    assert (manifest.state, manifest.files) == (STATE, {"common.pt": 1})
    content = file.read_bytes()
    unnoticed = []
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        try:
            read_manifest(tmp_path, AdapterManifest)
            unnoticed.append((bit, bytes(damaged[max(0, bit // 8 - 9) : bit // 8 + 9])))
        except WeightsError as error:
            assert "mixtral_run.json" in str(error)
    assert unnoticed == []


def test_the_checksum_is_that_of_the_text_with_zeros_in_its_place(tmp_path: Path) -> None:
    text = write(tmp_path).read_text()
    written = json.loads(text)["crc32"]
    assert text.endswith(f'"crc32": "{written}"\n}}\n')
    assert f"{zlib.crc32(text.replace(written, '00000000').encode()):08x}" == written


def test_a_manifest_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    file = write(tmp_path)
    values = json.loads(file.read_text())
    for name in ("crc32", "files", "tokenizer_files", "state"):
        del values[name]
    file.write_text(json.dumps(values))
    manifest = read_manifest(tmp_path, AdapterManifest)
    assert (manifest.files, manifest.state) == ({}, RunState())
    # Without the checksum the list of files is not trusted.
    file.write_text(json.dumps({**values, "files": {"common.pt": "00000001"}}))
    with pytest.raises(WeightsError, match="crc32: expected"):
        read_manifest(tmp_path, AdapterManifest)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer_steps", -1), ("optimizer_steps", True), ("num_skipped", "1"), ("recent_losses", [1, "x"]),
        ("recent_losses", [10**400]), ("validation_loss", []), ("run_files", {"../x": {}}),
        ("run_files", {"metrics.jsonl": {"num_bytes": 1, "crc32": "xyz"}}), ("run_files", [1]),
    ],
)  # fmt: skip
def test_a_state_of_another_form_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    write(tmp_path, state=STATE.to_mapping() | {name: value})
    with pytest.raises(WeightsError) as refused:
        read_manifest(tmp_path, AdapterManifest)
    assert [line.split(":")[0] for line in refused.value.problems] == [f"state.{name}"]
