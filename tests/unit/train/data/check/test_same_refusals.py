"""`data check` refuses what `finetune` and `align` refuse: the same inputs go to both, and each bad row is named."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.data import CheckConfig
from mixtral_run.config.verbs.align import AlignConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import MixtralRunError
from mixtral_run.model.architecture import MIXTRAL_8X7B
from mixtral_run.terminal.report import Report
from mixtral_run.train.data.check import run_check
from mixtral_run.train.data.sources import open_data
from mixtral_run.weights.manifest.describe import BaseDescription

GOOD = {"instruction": "Say 1.", "response": "1"}
LONG = {"instruction": "word " * 90, "response": "1"}
PAIR = {"prompt": "Say 1.", "chosen": "1", "rejected": "2"}
LONG_PAIR = {**PAIR, "rejected": "word " * 90}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
DPO: dict[str, Any] = {"method": "dpo"}
TEMPLATE = "{% for m in messages %}{{ raise_exception('never') }}{% endfor %}"


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def case(name: str, files: dict[str, str], code: int, *words: str, **settings: Any) -> Any:
    return pytest.param(files, code, words, settings, id=name)


def one(*rows: object) -> dict[str, str]:
    return {"a.jsonl": lines(*rows)}


TWO = {"a.jsonl": lines(GOOD, LONG), "b.jsonl": lines(GOOD)}
REFUSED = [
    case("prompt longer than a row", one(GOOD, LONG, GOOD, LONG), 2, "line 2: ", "line 4: "),
    case("in one of two files", TWO, 2, "line 2 of a.jsonl: "),
    case("answer longer than a row", one(PAIR, LONG_PAIR), 2, "line 2: ", **DPO),
    case("both answers longer than a row", one(PAIR, {**PAIR, "chosen": "word " * 26, "rejected": "word " * 27}), 2,
         "line 2: ", pack=True, **DPO),
    case("a single answer", one({"prompt": "a", "completion": "word " * 90, "label": True}), 2, "line 1: ",
         method="kto"),
    case("broken JSON", one(GOOD, "{"), 2, "line 2: "),
    case("no object", one(GOOD, 3), 2, "line 2: "),
    case("unknown keys", one(GOOD, {"a": 1}), 2, "line 2: "),
    case("two shapes", one({**GOOD, "question": "a", "answer": "b"}), 2, "line 1: "),
    case("empty answer", one(GOOD, {**GOOD, "response": " "}), 2, "line 2: "),
    case("half of a surrogate", one('{"instruction": "\\ud83d", "response": "b"}'), 2, "line 1: "),
    case("wrong order", one({"messages": [{"role": "assistant", "content": "a"}]}), 2, "line 1: "),
    case("nothing learned", one({"messages": [{"role": "user", "content": "a"},
                                              {"role": "assistant", "content": "b", "weight": 0}]}), 2, "line 1: "),
    case("tools that the template lacks", one(GOOD, {"messages": [{"role": "user", "content": "a"}, CALL]}), 2,
         "line 2"),
    case("the same answers", one({**PAIR, "rejected": "1"}), 2, "line 1: ", **DPO),
    case("pairs for finetune", one(PAIR), 2, "line 1: "),
    case("examples for align", one(GOOD), 2, "line 1: ", **DPO),
    case("no example", one(), 2, "no example"),
    case("no file", {}, 2, "a.jsonl", data_path=["a.jsonl"]),
    case("no field", one(GOOD), 2, "--field", field=("response=x",)),
    case("columns of one name", {"a.csv": "question,answer,answer\na,b,c\n"}, 2, "same name"),
    case("fields that the header lacks", {"a.csv": "question,answer\na,b\na,b,c\n"}, 2, "line 3: "),
    case("a weighted source without an example", {"a.jsonl": lines(GOOD), "b.jsonl": ""}, 2, "source number 2",
         data_path=["a.jsonl:1", "b.jsonl:1"]),
    case("weights too far apart", {"a.jsonl": lines(GOOD), "b.jsonl": lines(GOOD)}, 2, "too far apart",
         data_path=["a.jsonl:1", "b.jsonl:300000000"]),
    case("nothing to validate", one(GOOD), 2, "--valid-fraction 0.1", valid_fraction=0.1),
    case("a template that refuses", one(GOOD), 2, "line 1: ", template=TEMPLATE),
    case("no template", one(GOOD), 2, "--chat-template", chat_template="none.jinja"),
    case("ids that the model lacks", one(GOOD), 5, "ids end at", vocab_size=40),
]  # fmt: skip
TAKEN = [
    case("good", one(GOOD), 0),
    case("a prompt that leaves one token", one({"instruction": "word " * 56, "response": "1"}), 0),
    case("pairs that fit alone", one({**PAIR, "chosen": "word " * 26, "rejected": "word " * 27}), 0, **DPO),
    case("answers of kto under --pack", one({**PAIR, "chosen": "word " * 30, "rejected": "word " * 31}), 0, pack=True,
         method="kto"),
    case("weights", {"a.jsonl": lines(GOOD), "b.jsonl": lines(GOOD)}, 0, data_path=["a.jsonl:1", "b.jsonl:2"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "code", "words", "settings"), [*REFUSED, *TAKEN])
def test_both_refuse_the_same_rows(
    tmp_path: Path,
    tiny_tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    code: int,
    words: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in files.items():
        Path(name).write_text(content)
    given = dict(settings)
    if "template" in given:
        Path("t.jinja").write_text(given.pop("template"))
        given["chat_template"] = "t.jinja"
    (tmp_path / "base").mkdir()
    (tmp_path / "base/tokenizer").symlink_to(tiny_tokenizer_folder)
    architecture = dataclasses.replace(MIXTRAL_8X7B, vocab_size=given.pop("vocab_size", MIXTRAL_8X7B.vocab_size))
    base = BaseDescription(tmp_path / "base", architecture, "bfloat16", "0-0")
    given = {"data_path": tuple(given.pop("data_path", files)), "seq_length": 64, **given}

    def train() -> str:
        config_class = AlignConfig if "method" in given else FinetuneConfig
        config = config_class(load=base.folder, save=Path("out"), **given).check()
        return refusal(lambda: open_data(config, base, Report.silent()), code)

    def check() -> str:
        monkeypatch.setattr(run_check, "_base", lambda *_: (base.tokenizer, base))
        text = refusal(lambda: run_check.run_check(CheckConfig(load=base.folder, **given).check()), code)
        return capsys.readouterr().out + text

    trained, checked = train(), check()
    for word in words:
        assert word in trained and word in checked, f"{word}\n{trained}\n{checked}"
    assert rows(trained) == rows(checked) or not words


def refusal(job: Any, code: int) -> str:
    """The text of the error that a job ends with; the exit code must be `code`."""
    try:
        job()
    except MixtralRunError as error:
        assert error.exit_code == code, str(error)
        return str(error)
    assert code == 0, "nothing was refused"
    return ""


def rows(text: str) -> set[str]:
    """The rows that a text names as problems."""
    return set(re.findall(r"- (line \d+(?: of [\w.]+)?)", text))


def test_without_a_tokenizer_the_screen_says_what_is_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(LONG))
    run_check.run_check(CheckConfig(data_path=(str(file),), seq_length=64).check())
    assert "! No tokens are counted without the tokenizer of --load" in capsys.readouterr().out
    with pytest.raises(MixtralRunError, match=r"none\.jinja"):
        run_check.run_check(CheckConfig(data_path=(str(file),), chat_template=str(tmp_path / "none.jinja")).check())


def test_a_row_that_is_too_long_says_which_length_it_needs(
    tmp_path: Path, tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(*[LONG] * 12, GOOD))
    base = BaseDescription(tmp_path, MIXTRAL_8X7B, "bfloat16", "0-0")
    monkeypatch.setattr(run_check, "_base", lambda *_: (tiny_tokenizer_folder, base))
    config = CheckConfig(data_path=(str(file),), load=tmp_path, seq_length=64)
    with pytest.raises(MixtralRunError, match="12 examples cannot be used") as caught:
        run_check.run_check(config.check())
    assert "    and 2 more; --json lists all\n" in capsys.readouterr().out
    needed = re.search(r"--seq-length (\d+) or more", str(caught.value))
    assert needed is not None
    run_check.run_check(dataclasses.replace(config, seq_length=int(needed[1])))
    with pytest.raises(MixtralRunError, match="12 examples cannot be used"):
        run_check.run_check(dataclasses.replace(config, seq_length=int(needed[1]) - 1, json=True))
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("\n{\n") :])
    assert (found["num_bad"], found["num_too_long"], len(found["problems"])) == (12, 12, 12)
    assert [each["place"] for each in found["rendered"]] == ["line 13"], "what is refused is not learned"
