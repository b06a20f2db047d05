"""Choice of a template, tokenizers that are refused, and fingerprints of encodings, in small parts."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken

from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.templates import open_template, prompt
from mixtral_run.train.data.templates.encoding import Encoding, content_digest
from mixtral_run.train.data.templates.open_template import file_problems, open_chat_template, template_of_adapter
from mixtral_run.weights.manifest.template_record import TemplateRecord
from tests.unit.train.data.templates.test_open_template import ANSWER, CHATML, RELEASED, with_template

V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (messages[0].content + '\n\n' if loop.revindex == 2 and messages[0].role == 'system' else '')"
    " + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)


def other_object(text: str) -> str:
    """Return an equal text that is another object, as a file or a command line gives it."""
    return "".join(list(text))


@pytest.mark.parametrize(
    ("version", "template", "is_form"),
    [
        ("v1", RELEASED, True),
        ("v1", RELEASED + "{{ ' more' if add_generation_prompt }}", True),
        ("v1", RELEASED + "{{ ' more' }}", False),
        ("v1", RELEASED + "{{ raise_exception('never') }}", False),
        ("v1", RELEASED + "{{ raise_exception('never') if messages | length == 5 }}", True),
        ("v1", RELEASED.replace("' [/INST]'", "'[/INST]'"), False),
        ("v1", V3, False),
        ("v3", V3, True),
        ("v3", V3.replace("'[INST]'", "'[INST] '").replace("'[/INST]'", "' [/INST]'"), True),
        ("v3", V3.replace("'[INST]'", "'[INST]  '"), False),
        ("v3", V3.replace("revindex == 2", "revindex == 4"), False),
    ],
)
def test_which_templates_are_the_form(version: str, template: str, is_form: bool) -> None:
    """Without its blank v3 has no form; without control tokens for tools, v1 has none for a template of tools."""
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer: Any = SimpleNamespace(**names, special_tokens_map=names, name_or_path="t")

    def found(record: TemplateRecord, adds_blank: bool) -> bool:
        form: Any = SimpleNamespace(is_v3=version == "v3", adds_blank=adds_blank)
        return open_template._writes_mixtral_form(record, tokenizer, form)

    assert found(TemplateRecord("tokenizer", template), True) is is_form
    assert found(TemplateRecord("tokenizer", template), False) is (is_form and version == "v1")
    assert found(TemplateRecord("tokenizer", template, CHATML), True) is (is_form and version == "v3")


@pytest.mark.parametrize("name", ["zebra.jinja", "many.jinja", "auto.jinja", "a"])
def test_a_file_may_have_any_name(
    llama_like_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(ANSWER, "utf-8")
    found = open_chat_template(name, llama_like_tokenizer)
    assert (found.name, found.record.text) == (name, ANSWER) and file_problems(name) == []
    template, remarks = template_of_adapter("auto", TemplateRecord(name, ANSWER), llama_like_tokenizer, tmp_path)
    assert (template.name, remarks) == (name, [])


def test_names_of_choices_are_compared_by_their_letters(llama_like_tokenizer: Any, tmp_path: Path) -> None:
    own = with_template(llama_like_tokenizer, CHATML)
    assert open_chat_template(other_object("mixtral"), own).name == "mixtral"
    assert file_problems(other_object("auto")) == file_problems(other_object("mixtral")) == []
    trained = TemplateRecord(other_object("tokenizer"), ANSWER)
    assert template_of_adapter(other_object("auto"), trained, own, tmp_path)[1] == [
        f"{tmp_path} was trained with another chat template than the tokenizer of the base has; the adapter's is used"
    ]


def test_another_template_than_that_of_the_training_is_said(llama_like_tokenizer: Any, tmp_path: Path) -> None:
    """Whichever of the two fingerprints sorts first."""
    smaller = set()
    for number in range(8):
        trained = TemplateRecord("tokenizer", f"{ANSWER}{number}")
        for choice, own in (("mixtral", llama_like_tokenizer), ("auto", with_template(llama_like_tokenizer, ANSWER))):
            template, remarks = template_of_adapter(choice, trained, own, tmp_path)
            smaller.add((choice, TemplateRecord("", ANSWER if choice == "auto" else None).fingerprint
                         < trained.fingerprint))  # fmt: skip
            assert len(remarks) == 1 and (template.name == "mixtral") is (choice == "mixtral")
    assert len(smaller) == 4
    assert template_of_adapter("mixtral", TemplateRecord("x", ANSWER), llama_like_tokenizer, tmp_path)[1] == [
        "--chat-template mixtral: the adapter was trained with another chat template, 'x'"
    ]


def test_tokens_of_the_template_for_tools_are_control_tokens(llama_like_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(llama_like_tokenizer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", normalized=False), AddedToken("<|im_end|>", normalized=False)])
    both = open_chat_template("auto", with_template(tokenizer, {"default": ANSWER, "tool_use": CHATML}))
    one = open_chat_template("auto", with_template(tokenizer, ANSWER))
    assert set(both._encoder.control) - set(one._encoder.control) == {"<|im_start|>", "<|im_end|>"}


def test_templates_of_a_tokenizer(llama_like_tokenizer: Any) -> None:
    for given, expected in (
        (None, None), ("", None), ({}, None), ("t", TemplateRecord("tokenizer", "t")),
        ({"x": "t"}, TemplateRecord("tokenizer", "t")),
        ({"x": "t", "default": "u"}, TemplateRecord("tokenizer", "u")),
        ({"tool_use": "t", "default": "u", "x": "v"}, TemplateRecord("tokenizer", "u", "t")),
    ):  # fmt: skip
        assert open_template.own_template(with_template(llama_like_tokenizer, given)) == expected


def test_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe{")
    for name, found in (
        ("gone", "No such file or directory"),
        ("bytes", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_template._read(tmp_path / name)
        assert caught.value.found == found
        expected = "auto, mixtral, or a file with a Jinja template, in UTF-8"
        assert file_problems(str(tmp_path / name)) == [
            f"--chat-template {tmp_path / name}: expected {expected}; found {found}"
        ]


def test_where_a_template_of_a_tokenizer_is(llama_like_tokenizer: Any) -> None:
    tokenizer = with_template(llama_like_tokenizer, "{% for messages")
    tokenizer.name_or_path = "my/model"
    with pytest.raises(ConfigError) as caught:
        open_chat_template("auto", tokenizer)
    assert caught.value.where == "chat template of my/model, line 1"


class Played:
    """STAND-IN for transformers' AutoTokenizer."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, list[Any]()

    def from_pretrained(self, folder: str, **given: Any) -> Any:
        self.asked.append((folder, given))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("bos", "eos", "found"),
    [(None, 2, "no bos_token"), (1, None, "no eos_token"), (None, None, "no bos_token and no eos_token"), (0, 0, None)],
)
def test_loading_never_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bos: int | None, eos: int | None, found: str | None
) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer: Any = SimpleNamespace(bos_token_id=bos, eos_token_id=eos, name_or_path="")
    played = Played(tokenizer)
    monkeypatch.setattr("transformers.AutoTokenizer", played)
    if found is None:
        assert prompt.load_tokenizer(tmp_path) is tokenizer and tokenizer.name_or_path == str(tmp_path)
    else:
        with pytest.raises(WeightsError) as caught:
            prompt.load_tokenizer(tmp_path)
        assert (caught.value.found, caught.value.where) == (found, str(tmp_path))
    assert [given for _, given in played.asked] == [{"local_files_only": True}]


def test_why_a_tokenizer_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    words = "".join(chr(0x4E00 + number) for number in range(300))
    monkeypatch.setattr("transformers.AutoTokenizer", Played(OSError(f"{words}\nmore")))
    with pytest.raises(WeightsError) as caught:
        prompt.load_tokenizer(tmp_path)
    assert caught.value.found == f"OSError: {words[:191]}"
    own = WeightsError("ours")
    monkeypatch.setattr("transformers.AutoTokenizer", Played(own))
    with pytest.raises(WeightsError) as caught:
        prompt.load_tokenizer(tmp_path)
    assert caught.value is own


def test_the_shortest_prompt() -> None:
    assert prompt.prompt_text(" \n日 本 ") == "[INST] 日 本 [/INST]"


def test_what_the_fingerprint_of_an_encoding_is(tmp_path: Path) -> None:
    """Version 1 of the kit's encoding, that of tokenizers, the template's name or content, and the files."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "my.jinja").write_bytes(b"abc")

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    begin, end = f"1, tokenizers {version('tokenizers')}\n", f"tokenizer.json {digest(b'{}')}\n"
    for choice, line in (
        ("auto", "auto"),
        ("mixtral", "mixtral"),
        (str(tmp_path / "my.jinja"), f"file {digest(b'abc')}"),
        (str(tmp_path / "gone"), f"file {digest(b'')}"),
    ):
        assert Encoding(folder, choice).fingerprint() == digest(f"{begin}{line}\n{end}".encode())


def test_a_content_has_64_bits() -> None:
    """The first eight bytes of the hash of the texts as JSON, the lowest first."""
    tools = ({"b": 1, "a": 2},)
    conversation = (Message("user", " é ", name="n"), Message("system", " "), Message("assistant", "b"))
    text = (
        '[[["user", "\\u00e9", [], null, "n"], ["assistant", "b", [], null, null]], null, [{"a": 2, "b": 1}]]'
    )  # fmt: skip
    expected = hashlib.sha256(text.encode()).digest()
    number = sum(expected[place] * 256**place for place in range(8))
    assert content_digest(Example("line 1", conversation, tools=tools)) == number
    assert content_digest(Example("line 2", conversation, tools=({"a": 2, "b": 1},))) == number
    rejected = hashlib.sha256(json.dumps([[], None, [], []]).encode()).digest()
    assert content_digest(Example("", rejected=(), label=True)) == int.from_bytes(rejected[:8], "little")
