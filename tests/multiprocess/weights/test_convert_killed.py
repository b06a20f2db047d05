"""A conversion that is killed at any point: the same command goes on from there and ends with the same bytes."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path

import pytest

from mixtral_run.config.verbs.weights import ConvertConfig, VerifyConfig
from mixtral_run.errors import WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.to_megatron import convert
from mixtral_run.weights.io import atomic_folder
from mixtral_run.weights.manifest.describe import describe_base
from mixtral_run.weights.manifest.manifest import read_values
from mixtral_run.weights.verify.verify import verify
from tests.multiprocess.conftest import environment_of
from tests.multiprocess.weights.test_convert import convert_quietly
from tests.multiprocess.weights.test_convert_errors import content, refused
from tests.support.processes import warm
from tests.support.tiny import write_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "hf")
    return tmp_path / "hf"


KILLED = """
import importlib, os, pathlib, signal, sys
place, when, how = sys.argv.pop(1), sys.argv.pop(1), sys.argv.pop(1)
module, _, path = place.partition(":")
*owners, name = path.split(".")
owner = importlib.import_module(module)
for each in owners:
    owner = getattr(owner, each)
original = getattr(owner, name)
calls = []

def killed(*arguments, **more):
    calls.append(None)
    if when in (f"before call {len(calls)}", f"before {arguments[-1]}"):
        os.kill(os.getpid(), signal.SIGKILL)
    result = original(*arguments, **more)
    if when == "after":
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, name, killed)
staging = importlib.import_module("mixtral_run.weights.io.atomic_folder")
if how == "moved up":
    staging._stays = lambda _: True
if how == "without exchange":
    staging.exchange = lambda *_: False
from mixtral_run.cli.main import main
main()
"""
CONVERT, STAGING = "mixtral_run.weights.convert.to_megatron:", "mixtral_run.weights.io.atomic_folder:"


def killed(
    place: str, when: str, tiny: Path, output: Path, *flags: str, moved_up: bool = False, without_exchange: bool = False
) -> None:
    how = "moved up" if moved_up else "without exchange" if without_exchange else ""
    words = [place, when, how, "convert", "--hf-model-path", str(tiny), "--output-path", str(output), *flags]
    done = warm.run(["-c", KILLED, *words], environment_of())
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.fixture
def no_copying(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*_: object) -> None:
        raise AssertionError("a job is done again")

    monkeypatch.setattr("mixtral_run.weights.convert.copy._Worker.copy", copy)


@pytest.mark.parametrize(
    ("place", "when"),
    [
        (CONVERT + "write_proof", "before call 1"),
        (CONVERT + "write_proof", "after"),
        (CONVERT + "write_metadata", "before call 1"),
        (CONVERT + "write_manifest", "after"),
        (STAGING + "sync_tree", "before call 1"),
        (STAGING + "Staging._rename", "before call 1"),
    ],
)
def test_killed_once_all_is_copied_nothing_is_copied_again(
    tmp_path: Path, tiny: Path, request: pytest.FixtureRequest, place: str, when: str
) -> None:
    output = tmp_path / "out"
    expected = convert_quietly(tiny, tmp_path / "whole", 2, 4)
    killed(place, when, tiny, output)
    assert not output.exists()
    request.getfixturevalue("no_copying")
    assert convert_quietly(tiny, output, 2, 4) == expected
    assert content(output) == content(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "out", "whole"]


def test_killed_once_it_is_in_its_place_it_is_whole(tmp_path: Path, tiny: Path) -> None:
    killed(STAGING + "Staging._rename", "after", tiny, tmp_path / "out")
    verify(VerifyConfig(load=tmp_path / "out", against=tiny, proof=True), Report.silent()).check()
    assert "--overwrite replaces it" in str(refused(tiny, tmp_path / "out"))


def test_killed_while_one_takes_anothers_place_there_is_always_one(tmp_path: Path, tiny: Path) -> None:
    write_tiny(tmp_path / "other", seed=5)
    output = tmp_path / "out"
    first = convert_quietly(tmp_path / "other", output, 1, 2)
    killed(STAGING + "exchange", "before call 1", tiny, output, "--overwrite")
    assert read_values(output)["fingerprint"] == first
    killed(STAGING + "exchange", "after", tiny, output, "--overwrite")
    verify(VerifyConfig(load=output, against=tiny, proof=True), Report.silent()).check()
    third = convert_quietly(tmp_path / "other", output, 2, 4, overwrite=True)
    assert third == first
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "other", "out"]


def test_killed_where_places_cannot_be_exchanged_the_old_one_is_named(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / "other", seed=5)
    output = tmp_path / "out"
    convert_quietly(tmp_path / "other", output, 1, 2)
    old = content(output)
    killed("pathlib:Path.rename", f"before {output}", tiny, output, "--overwrite", without_exchange=True)
    with pytest.raises(WeightsError, match="cut off") as failure:
        describe_base(output)
    assert f"mv {tmp_path / '.out.replaced'} {output}" in str(failure.value)
    assert content(tmp_path / ".out.replaced") == old
    monkeypatch.setattr(atomic_folder, "exchange", lambda *_: False)
    convert_quietly(tiny, output, 2, 4, overwrite=True)
    verify(VerifyConfig(load=output, against=tiny, proof=True), Report.silent()).check()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["hf", "other", "out"]


@pytest.mark.parametrize("entry", ["iter_0000001", "tokenizer", "latest_checkpointed_iteration.txt"])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_while_it_is_moved_into_a_mount_point(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool, entry: str
) -> None:
    """Some of it is in its place, the marker is not; what was there before is gone or going."""
    monkeypatch.setattr(atomic_folder, "_stays", lambda _: True)
    expected = convert_quietly(tiny, tmp_path / "whole", 2, 4)
    output = tmp_path / "out"
    output.mkdir()
    flags = {"overwrite": True} if earlier else {}
    if earlier:
        write_tiny(tmp_path / "other", seed=5)
        convert_quietly(tmp_path / "other", output, 1, 2)
    killed("pathlib:Path.rename", f"before {output / entry}", tiny, output, *["--overwrite"] * earlier, moved_up=True)
    assert not (output / "latest_checkpointed_iteration.txt").exists()
    assert (output / ".mixtral-run-unfinished" / "latest_checkpointed_iteration.txt").exists()
    monkeypatch.setattr("mixtral_run.weights.convert.copy._Worker.copy", lambda *_: pytest.fail("a job is done again"))
    assert convert_quietly(tiny, output, 2, 4, **flags) == expected
    assert content(output) == content(tmp_path / "whole")


def test_killed_when_all_is_moved_into_a_mount_point(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_folder, "_stays", lambda _: True)
    output = tmp_path / "out"
    killed(STAGING + "shutil.rmtree", "before call 2", tiny, output, moved_up=True)
    verify(VerifyConfig(load=output, against=tiny, proof=True), Report.silent()).check()
    left = output / ".mixtral-run-unfinished" / "journal.jsonl"
    assert left.is_file()
    assert "--overwrite replaces it" in str(refused(tiny, output))
    # What the journal names is there no more.
    convert_quietly(tiny, output, 2, 4, overwrite=True)
    verify(VerifyConfig(load=output, against=tiny, proof=True), Report.silent()).check()
    assert not left.parent.exists()


@pytest.mark.parametrize("torn", [b"", b'{"job": 64, "sour', b"\0" * 100, b'{"job": 6\xff\xfe', b"\xc3\x28\n"])
def test_a_torn_end_of_the_journal_is_left_out(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    """As a host that lost power leaves it."""
    output = tmp_path / "out"
    journal = tmp_path / ".out.unfinished" / "journal.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(
            "mixtral_run.weights.convert.to_megatron.write_proof", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            convert_quietly(tiny, output, 2, 4)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:10]) + torn)
    reported = io.StringIO()
    convert(ConvertConfig(hf_model_path=str(tiny), output_path=output), Report(reported))
    assert "continuing after" in reported.getvalue()
    convert_quietly(tiny, tmp_path / "whole", 2, 4)
    assert content(output) == content(tmp_path / "whole")


def test_what_another_conversion_left_is_not_used(tmp_path: Path, tiny: Path) -> None:
    output = tmp_path / "out"
    journal = tmp_path / ".out.unfinished" / "journal.jsonl"
    killed(CONVERT + "write_proof", "before call 1", tiny, output)
    assert journal.is_file()
    write_tiny(tiny, seed=8)  # the same names and sizes, other bytes
    expected = convert_quietly(tiny, tmp_path / "fresh", 2, 4)
    assert convert_quietly(tiny, output, 2, 4) == expected
    assert content(output) == content(tmp_path / "fresh")


def test_other_heads_are_another_conversion(tmp_path: Path, tiny: Path) -> None:
    """Every size stays: the order of the rows does not."""
    output, config = tmp_path / "out", tiny / "config.json"
    killed(CONVERT + "write_proof", "before call 1", tiny, output)
    values = json.loads(config.read_text())
    heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    changed = {"num_attention_heads": heads * 2, "num_key_value_heads": groups * 2, "head_dim": head_dim // 2}
    config.write_text(json.dumps(values | changed))
    convert_quietly(tiny, output, 2, 4)
    convert_quietly(tiny, tmp_path / "fresh", 2, 4)
    assert content(output) == content(tmp_path / "fresh")
