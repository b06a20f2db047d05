"""Choice of the chat template, by --chat-template and by an adapter's manifest."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers

from mixtral_run.config.data import DataConfig
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.templates.open_template import file_problems, open_chat_template, template_of_adapter
from mixtral_run.train.data.templates.prompt import load_tokenizer
from mixtral_run.weights.hf.tokenizer_files import copy_tokenizer
from mixtral_run.weights.manifest.template_record import TemplateRecord

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ANSWER = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
# Forms in which Mixtral-Instruct's template was released: with and without a blank before answers, with and without
# system messages.
RELEASED = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
WITH_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{%- set before = messages[0].content + '\n\n' %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set before = '' %}"
    "{%- set rest = messages %}{%- endif %}{{- bos_token }}{%- for message in rest %}"
    "{%- if message.role == 'user' %}{{- ' [INST] ' + (before if loop.first else '') + message.content + ' [/INST]' }}"
    "{%- else %}{{- ' ' + message.content + eos_token }}{%- endif %}{%- endfor %}"
)
CONVERSATION = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d"))


def with_template(tokenizer: Any, template: Any) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("template", [RELEASED, WITH_SYSTEM])
def test_a_released_template_of_mixtral_is_its_form(llama_like_tokenizer: Any, template: str) -> None:
    found = open_chat_template("auto", with_template(llama_like_tokenizer, template))
    assert (found.name, found.record.text) == ("mixtral", None)
    assert found.fingerprint == open_chat_template("mixtral", llama_like_tokenizer).fingerprint


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", "</s>"),
        RELEASED.replace("[INST] ", "[INST]"),
        RELEASED.replace("{{ bos_token }}", "{{ bos_token }}[INST] Be kind. [/INST] I am.</s>"),
        WITH_SYSTEM.replace("messages[0].content + '\n\n'", "'<<SYS>>' + messages[0].content + '<</SYS>>'"),
        WITH_SYSTEM.replace("messages[0].content + '\n\n'", "''"),
    ],
)
def test_other_templates_are_used_as_they_are(llama_like_tokenizer: Any, template: str) -> None:
    found = open_chat_template("auto", with_template(llama_like_tokenizer, template))
    assert (found.name, found.record.text) == ("tokenizer", template)
    assert found.fingerprint != open_chat_template("mixtral", llama_like_tokenizer).fingerprint


def test_a_tokenizer_without_a_template_has_mixtrals_form(llama_like_tokenizer: Any) -> None:
    assert open_chat_template("auto", llama_like_tokenizer).name == "mixtral"
    assert open_chat_template("mixtral", with_template(llama_like_tokenizer, ANSWER)).name == "mixtral"


def test_several_templates_of_a_tokenizer_need_a_default(llama_like_tokenizer: Any) -> None:
    named = {"rag": ANSWER, "tool_use": CHATML}
    with pytest.raises(ConfigError) as caught:
        open_chat_template("auto", with_template(llama_like_tokenizer, named))
    assert "rag, tool_use" in str(caught.value) and "--chat-template FILE" in str(caught.value)
    found = open_chat_template("auto", with_template(llama_like_tokenizer, named | {"default": ANSWER}))
    assert (found.record.text, found.record.tools_text) == (ANSWER, CHATML)
    assert open_chat_template("auto", with_template(llama_like_tokenizer, {"rag": ANSWER})).record.text == ANSWER


def test_a_file_is_used_even_if_it_is_mixtrals_form(llama_like_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("\ufeff" + RELEASED, "utf-8")
    found = open_chat_template(str(tmp_path / "mine.jinja"), llama_like_tokenizer)
    assert (found.name, found.record.text) == ("mine.jinja", RELEASED)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{% for message in messages %}", "not a valid Jinja template"),
        (b"\xff\xfe{", "cannot be read"),
        (b"Hello", "reads no|not a chat template"),
        (b"{# messages #}" + b" " * 1_000_001, "too long"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_template_is_refused(
    llama_like_tokenizer: Any, tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        open_chat_template(str(path), llama_like_tokenizer)
    assert str(path) in str(caught.value)
    problems = file_problems(str(path))
    assert len(problems) == ("cannot be read" in words) and all(f"--chat-template {path}" in each for each in problems)


def test_a_tokenizer_without_a_fast_form_is_refused(llama_like_tokenizer: Any) -> None:
    class Slow:
        bos_token_id, eos_token_id, chat_template, name_or_path = 1, 2, None, "my/model"

    with pytest.raises(WeightsError, match=r"no tokenizer\.json"):
        open_chat_template("auto", Slow())  # type: ignore[arg-type]


def test_an_empty_choice_is_a_problem() -> None:
    for problems in (
        DataConfig(mock_data=True, chat_template="").problems(),
        GenerateConfig(load=Path("base"), prompt=("a",), chat_template="").problems(),
    ):
        assert any("--chat-template" in each for each in problems)


def test_an_adapter_brings_its_template(llama_like_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "other.jinja").write_text(ANSWER, "utf-8")
    plain, own = llama_like_tokenizer, with_template(llama_like_tokenizer, CHATML)
    trained = TemplateRecord("tokenizer", CHATML)

    def chosen(choice: str, recorded: TemplateRecord | None, tokenizer: Any) -> tuple[str | None, int]:
        template, warnings = template_of_adapter(choice, recorded, tokenizer, tmp_path)
        return template.record.text, len(warnings)

    assert chosen("auto", trained, own) == (CHATML, 0)
    # The base's tokenizer has another one now, or none.
    assert chosen("auto", trained, with_template(plain, ANSWER)) == (CHATML, 1)
    assert chosen("auto", trained, plain) == (CHATML, 1)
    assert chosen("auto", TemplateRecord("other.jinja", ANSWER), own) == (ANSWER, 0)
    assert chosen("mixtral", trained, own) == (None, 1)
    assert chosen(str(tmp_path / "other.jinja"), trained, own) == (ANSWER, 1)
    assert chosen(str(tmp_path / "other.jinja"), TemplateRecord("same.jinja", ANSWER), own) == (ANSWER, 0)
    # Adapters without a record were trained in Mixtral-Instruct's form, whatever the tokenizer has.
    assert chosen("auto", None, own) == (None, 0) == chosen("mixtral", None, own)


def test_the_record_is_the_template_and_not_the_tokenizer(llama_like_tokenizer: Any, tiny_tokenizer: Any) -> None:
    one, other = (
        open_chat_template("auto", with_template(each, CHATML)) for each in (llama_like_tokenizer, tiny_tokenizer)
    )
    assert one.record == other.record and one.record.fingerprint == other.record.fingerprint
    # The token cache depends on both.
    assert one.fingerprint != other.fingerprint
    assert TemplateRecord.parse(json.loads(json.dumps(one.record.to_mapping()))) == one.record
    assert TemplateRecord("mixtral").fingerprint != one.record.fingerprint


def test_a_model_with_chatml_is_trained_in_its_own_form(tmp_path: Path) -> None:
    """A tokenizer of one id a character, whose end of a text is <|im_end|>, as its files."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "\n", *map(chr, range(0x21, 0x7F))]
    core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    added = ("<unk>", "<s>", "</s>", "<|im_end|>", "<|im_start|>")
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in added])
    core.save(str(tmp_path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    settings = names | {"chat_template": CHATML, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    end, start = len(pieces), len(pieces) + 1

    def characters(text: str) -> list[int]:
        return [pieces.index("▁" if each == " " else each) for each in text]

    for form in ("tokenizer_config.json", "chat_template.jinja"):
        found = open_chat_template("auto", load_tokenizer(tmp_path))
        assert found.name == "tokenizer" and found.stop_ids == {end}, form
        encoded = found.encode(Example("line 1", (Message("user", "a"), Message("assistant", "b c"))))
        # SentencePiece's `▁` follows each control token, as in Transformers.
        question = [start, *characters(" user\na"), end, *characters(" \n")]
        answer = [start, *characters(" assistant\n"), *characters("b c"), end]
        assert encoded.tokens.tolist() == [*question, *answer, *characters(" \n")], form
        assert encoded.learned == ((len(question) + 12, len(question) + len(answer)),)
        (tmp_path / "chat_template.jinja").write_text(CHATML)
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"})
        )


def test_a_merged_model_carries_the_template(llama_like_tokenizer: Any, tmp_path: Path) -> None:
    llama_like_tokenizer.save_pretrained(tmp_path)
    TemplateRecord("mixtral").write(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    TemplateRecord("mine.jinja", CHATML).write(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == CHATML
    TemplateRecord("tokenizer", CHATML, ANSWER).write(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == {"default": CHATML, "tool_use": ANSWER}
    copy_tokenizer(tmp_path, tmp_path / "copied")
    assert load_tokenizer(tmp_path / "copied").chat_template == {"default": CHATML, "tool_use": ANSWER}
