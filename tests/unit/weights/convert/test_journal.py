"""A conversion that continues trusts nothing: damage to what an interrupted one left is found."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.convert.journal import Journal
from mixtral_run.weights.convert.to_megatron import convert
from tests.support.tiny import write_tiny

NUM_NOTED = 8


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    write_tiny(folder)
    return folder


def run(hf: Path, output: Path) -> str:
    printed = io.StringIO()
    config = ConvertConfig(
        hf_model_path=str(hf), output_path=output, workers=1, tensor_model_parallel_size=1, expert_model_parallel_size=2
    )
    convert(config, Report(printed))
    return " ".join(printed.getvalue().split())


def hashes(folder: Path) -> dict[str, str]:
    return {each.name: hashlib.sha256(each.read_bytes()).hexdigest() for each in folder.glob("iter_*/*.distcp")}


@pytest.fixture(scope="module")
def expected(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("whole") / "out"
    run(hf, output)
    return hashes(output)


@pytest.fixture
def cut(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a conversion that was interrupted after some jobs."""
    add = Journal.add

    def interrupted(journal: Journal, finished: object) -> None:
        add(journal, list(finished)[:NUM_NOTED])  # type: ignore[call-overload]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(hf, tmp_path / "out")
    work = tmp_path / ".out.unfinished"
    assert len(lines(work)) == NUM_NOTED + 1
    return work


def lines(work: Path) -> list[str]:
    return (work / "journal.jsonl").read_text().splitlines(keepends=True)


def first_file(work: Path) -> Path:
    return min(work.glob("iter_*/*.distcp"))


def flip(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def zero(work: Path) -> None:
    file = first_file(work)
    file.write_bytes(bytes(file.stat().st_size))


def changed_line(work: Path) -> None:
    found = lines(work)
    crc, _, content = found[3].partition(" ")
    values = json.loads(content)
    values["sources"] = {name: value ^ 1 for name, value in values["sources"].items()}
    found[3] = f"{crc} {json.dumps(values)}\n"
    (work / "journal.jsonl").write_text("".join(found))


def deep_line(work: Path) -> None:
    found = lines(work)
    found[3] = "[" * 100_000 + "\n"
    (work / "journal.jsonl").write_text("".join(found))


def cut_off_line(work: Path) -> None:
    (work / "journal.jsonl").write_text("".join(lines(work)) + lines(work)[1][:30])


DAMAGED, COPIED_AGAIN, CONTINUES = "begins anew", "are copied again", "continuing after"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda _: None, (CONTINUES,)),
        (cut_off_line, (CONTINUES,)),
        (lambda work: os.truncate(first_file(work), 1000), (COPIED_AGAIN,)),
        (zero, (COPIED_AGAIN,)),
        (lambda work: flip(first_file(work), 200_000), (COPIED_AGAIN, CONTINUES)),
        (changed_line, (DAMAGED,)),
        (deep_line, (DAMAGED,)),
        (lambda work: flip(work / "journal.jsonl", 300), (DAMAGED,)),
    ],
)
def test_damage_is_found_and_the_result_is_right(
    cut: Path, hf: Path, expected: dict[str, str], damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    damage(cut)
    printed = run(hf, cut.parent / "out")
    for word in words:
        assert word in printed
    if DAMAGED in words:
        assert CONTINUES not in printed
    if words == (CONTINUES,):
        assert DAMAGED not in printed and COPIED_AGAIN not in printed
    assert hashes(cut.parent / "out") == expected
    assert not cut.exists()


@pytest.mark.parametrize("note", ['{"new": ["../../x"]}', "[1", "{}", '{"new": [1]}', "[" * 100_000])
def test_a_damaged_note_of_a_move_is_refused_in_words(cut: Path, hf: Path, note: str) -> None:
    (cut / ".moving.json").write_text(note)
    with pytest.raises((WeightsError, ConfigError)) as refused:
        run(hf, cut.parent / "out")
    assert f"rm -r {cut}" in str(refused.value)
    assert not (cut / ".mixtral-run.lock").exists()
