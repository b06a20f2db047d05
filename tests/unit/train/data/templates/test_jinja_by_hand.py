"""Jinja templates in small parts: what is rendered, which tokens are learned, and bounds, worked out by hand."""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.train.data.reading.example import Example, Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem
from mixtral_run.train.data.templates import jinja_template, template_sandbox, text_encoder
from mixtral_run.train.data.templates.jinja_template import JinjaTemplate
from mixtral_run.train.data.templates.template_sandbox import Rendered, SandboxedTemplate, TooLong
from mixtral_run.train.data.templates.text_encoder import TextEncoder
from mixtral_run.weights.manifest.template_record import TemplateRecord
from tests.unit.train.data.templates.test_encoder_by_hand import tokenizer_of

TURNS = "{% for m in messages %}<|{{ m.content }}/{% endfor %}{{ '<|' if add_generation_prompt }}"
BLOCKS = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}BLOCK{% endgeneration %}BEHIND"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
GENERATION = "{% endgeneration %}{% generation %}"


def template_of(text: str, tools_text: str | None = None) -> JinjaTemplate:
    """Return a template with a tokenizer of one id a letter, in which `/` ends a turn."""
    encoder = TextEncoder(tokenizer_of("/"))
    return JinjaTemplate(TemplateRecord("my", text, tools_text), encoder, {}, 90, 91, "here")


def said(text: str, learned: bool = True) -> Message:
    return Message("".join(["assis", "tant"]), text, learned)


def asked(text: str) -> Message:
    return Message("".join(["us", "er"]), text)


def learned_of(template: JinjaTemplate, *messages: Message, tools: Any = ()) -> list[str]:
    """Return the texts of the learned tokens, of which each has one letter."""
    whole = template._conversation(messages, tools).render(len(messages)).text
    encoded = template.encode(Example("line 1", messages, tools=tools))
    assert len(encoded.tokens) == len(whole)
    return [template._encoder.show(whole)[begin:end] for begin, end in encoded.learned]


def problem_of(template: JinjaTemplate, *messages: Message) -> str:
    with pytest.raises(ExampleProblem) as caught:
        template.encode(Example("line 1", messages))
    return caught.value.problem


CONVERSATION = (asked("a"), said("b"), asked("cc"), said("dd"), said("e"), asked("f"), said("gh"))


def test_each_part_of_a_conversation_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole first; of each answer what stands before it and, except for the last one, up to its end."""
    asked_for: list[tuple[int, bool]] = []
    render = jinja_template._Conversation.render

    def noted(self: Any, count: int, *, prompt: bool = False) -> Rendered:
        asked_for.append((count, prompt))
        return render(self, count, prompt=prompt)

    template = template_of(TURNS)
    assert learned_of(template, *CONVERSATION) == ["b/", "dd/", "e/", "gh/"]
    monkeypatch.setattr(jinja_template._Conversation, "render", noted)
    template.encode(Example("line 1", CONVERSATION))
    assert asked_for == [
        (7, False), (1, True), (2, False), (3, True), (4, False), (4, True), (5, False), (6, True),
    ]  # fmt: skip


def test_which_messages_count() -> None:
    template = template_of(TURNS)
    assert learned_of(template, asked(""), said("b", False), Message("ai", "x"), said("c")) == ["c/"]
    empty = (Message("".join(["sys", "tem"]), ""), asked(""), said("b"))
    assert template.encode(Example("line 1", empty)).tokens.tolist() == [26, 28, 29, 26, 28, 1, 29]
    assert problem_of(template, asked("a"), Message("ai", "b")) == (
        "the conversation ends with the ai; expected an answer of the assistant"
    )
    assert problem_of(template, Message("ai", "b"), said("b", False)) == (
        "no answer counts in the loss: 'weight' 0 or 'train' false on every one"
    )
    assert problem_of(template) == "the conversation has no messages"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{% for m in messages %}<|{{ m.content if loop.index != 4 }}{{ '/' if loop.index != 4 }}{% endfor %}"
         "{{ '<|' if add_generation_prompt }}", "the template writes nothing for message 4"),
        ("{% for m in messages %}<|{{ m.content }}/{% endfor %}{{ '<|' if add_generation_prompt }}"
         "{{ '>' if add_generation_prompt and messages | length == 3 }}",
         "the template does not write one conversation step by step: the prompt for message 4 has '/<|b/<|cc/<|>' "
         "where the conversation with it has '/<|b/<|cc/<|dd/' (character 16)"),
        ("{% for m in messages %}<|{{ m.content }}/{% endfor %}{{ '<|' if add_generation_prompt }}"
         "{{ '>' if messages | length == 4 }}",
         "the template does not write one conversation step by step: the conversation up to message 4 has "
         "'b/<|cc/<|dd/>' where the whole has 'b/<|cc/<|dd/<|e/<|f/<|gh/' (character 19)"),
    ],
)  # fmt: skip
def test_the_message_that_does_not_fit_is_named(text: str, problem: str) -> None:
    found = problem_of(template_of(text), *CONVERSATION)
    # The text that is shown begins 12 characters before the difference.
    assert found == problem


@pytest.mark.parametrize(("first", "second"), [("本", "語"), ("語", "本")])
@pytest.mark.parametrize("before", [12, 30, 31])
def test_a_difference_between_letters_of_many_bytes(first: str, second: str, before: int) -> None:
    found: Any = object.__new__(jinja_template._Conversation)
    found._encoder = SimpleNamespace(show=lambda text: text)
    same = "".join(chr(0x4E00 + number) for number in range(before))
    with pytest.raises(ExampleProblem) as caught:
        found._check_beginning(same + first, "one", "".join([*same, second]), "other")
    shown = same[-12:]
    assert caught.value.problem.endswith(
        f"one has {shown + first!r} where other has {shown + second!r} (character {before + 1})"
    )


def test_blocks_that_touch_or_lie_in_others() -> None:
    """An answer may have several blocks; each ends with its own text, the last one with the end of the turn."""
    two = BLOCKS.replace("BLOCK", "x" + GENERATION + "{{ m.content }}/").replace("BEHIND", "z")
    assert learned_of(template_of(two), asked("a"), said("b"), asked("c"), said("d")) == ["x", "b/", "x", "d/"]
    behind = BLOCKS.replace("BLOCK", "{{ m.content }}").replace("BEHIND", "/")
    for answers in (("b",), ("bb",), ("b", "c"), ("b", "cc", "d")):
        turns = [message for text in answers for message in (asked("a"), said(text))]
        assert learned_of(template_of(behind), *turns) == [f"{text}/" for text in answers]
    conversation = template_of(BLOCKS)._conversation((asked("a"), said("b"), said("c", False)), ())
    assert conversation._generation_spans(Rendered("", ((1, 3), (3, 4)))) == [((1, 3), True), ((3, 4), False)]
    assert conversation._generation_spans(Rendered("", ((1, 3), (7, 9)))) == [((1, 3), True), ((7, 9), False)]
    for places in (((1, 9), (2, 4)), ((1, 4), (3, 9)), ((1, 2), (3, 9), (8, 9))):
        with pytest.raises(ExampleProblem) as caught:
            conversation._generation_spans(Rendered("", places))
        assert caught.value.problem == "the template has generation blocks inside of others"
    for several in (((1, 3),), ((1, 3), (3, 4), (4, 5))):
        with pytest.raises(ExampleProblem) as caught:
            conversation._generation_spans(Rendered("", several))
        assert caught.value.problem == (
            f"the template writes {len(several)} generation blocks for 2 answers, of which some are not learned"
        )
    learned = template_of(BLOCKS)._conversation((Message("ai", "a", False), said("b"), said("c")), ())
    assert learned._generation_spans(Rendered("", ((1, 3),))) == [((1, 3), True)]


def test_the_last_block_needs_an_end() -> None:
    for behind in ("", "x"):
        template = template_of(BLOCKS.replace("BLOCK", "{{ m.content }}").replace("BEHIND", behind))
        assert problem_of(template, asked("a"), said("0123456789b")) == (
            f"the template ends an answer with {'a0123456789b'!r}, which has no control token; a model would not learn "
            "to stop"
        )


@pytest.mark.parametrize(
    ("text", "span", "end"),
    [
        ("ab/", (0, 3), 3), ("ab/ ", (0, 4), 3), ("ab/  ", (0, 5), 3), ("ab/x", (0, 4), None), ("ab/ x", (0, 5), None),
        ("ab", (0, 2), None), ("/a", (0, 2), None), ("/", (0, 1), 1), ("//", (0, 2), 2), ("/ab", (1, 3), None),
        ("/ ", (0, 2), 1), ("a/ ", (0, 3), 2), ("a/ ", (1, 3), 2), ("a/ ", (2, 3), None), ("a/b/  ", (0, 6), 4),
        ("a/b/   ", (0, 7), 4), ("aa/b/ ", (0, 6), 5), ("ab", (1, 1), None),
    ],
)  # fmt: skip
def test_the_end_of_a_turn(text: str, span: tuple[int, int], end: int | None) -> None:
    """After the last control token, if nothing but blanks follows it."""
    found: Any = object.__new__(JinjaTemplate)
    found._encoder = SimpleNamespace(is_added=lambda number, shown: number == 7 and shown == "/")
    ids = [7 if letter == "/" else 0 for letter in text]
    places = [(number, number + 1) for number in range(len(text))]
    assert found._end_of_turn(ids, places, span, text) == end


def test_characters_of_tokens_without_a_character() -> None:
    far = [(number + 1000, end + 1000) for number, end in ((0, 2), (2, 4), (4, 4), (4, 6), (6, 9))]
    begin = int("1004")
    assert jinja_template._tokens_of(begin, 1009, far) == (2, 5)
    assert jinja_template._tokens_of(begin, 1006, far) == (2, 4)
    assert jinja_template._tokens_of(0, 0, []) == (0, 0)


@pytest.mark.parametrize("change", ["replace('/', '!')", "replace('/', '~')"])
def test_a_text_that_a_template_changes_is_refused(change: str) -> None:
    template = template_of(TURNS.replace("m.content", f"m.content | {change}"))
    assert learned_of(template, asked("a"), said("b")) == ["b/"]
    assert problem_of(template, asked("x/y"), said("b")) == (
        "a text contains a control token, and the template does not write it as it is"
    )
    assert learned_of(template_of(TURNS), asked("x/y"), said("b/c")) == ["b/c/"]


def test_how_a_template_is_described() -> None:
    assert template_of(TURNS).describe() == "my; learned is what it adds for each answer"
    assert template_of(BLOCKS).describe() == "my; learned is its generation blocks"


def test_tools_choose_their_own_template_and_are_none_without() -> None:
    template = template_of(TURNS + "{{ 'n' if tools is none else 'y' }}", TURNS + "{{ tools[0].a }}")
    assert template.prompt([asked("b")])[-1] == 13
    assert template.prompt([asked("b")], [{"a": "z"}])[-1] == 25
    one = template_of(TURNS + "{{ 'n' if tools is none else 'y' }}")
    assert one.prompt([asked("b")], [{"a": "z"}])[-1] == 24


def test_keys_and_roles_are_not_changed() -> None:
    given = {"content": "a", "role": "b", "z": {"".join(["ro", "le"]): "c", "name": ["d", 1.5]}}
    expected = {"content": "A", "role": "b", "z": {"role": "c", "name": ["D", 1.5]}}
    assert text_encoder.mapped(given, str.upper) == expected


def test_the_longest_template(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "LONGEST_TEMPLATE", 1012)
    text = "{{messages}}" + " " * 1000
    SandboxedTemplate(text, "here", {})
    with pytest.raises(ConfigError) as caught:
        SandboxedTemplate(text + " ", "here", {})
    assert (caught.value.where, caught.value.expected, caught.value.found) == (
        "here", "at most 1,012 characters", "1,013",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("error", "where", "found"),
    [(TooLong(), "here", "TooLong"), (OSError("x"), "here", "OSError: x"), (SyntaxError("x\ny"), "here, line 3", None)],
)
def test_a_template_that_does_not_compile(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str, found: str | None
) -> None:
    def refuse(_: str) -> None:
        raise error

    if isinstance(error, SyntaxError):
        error.lineno = 3
    monkeypatch.setattr("transformers.utils.chat_template_utils._compile_jinja_template", refuse)
    with pytest.raises(ConfigError) as caught:
        SandboxedTemplate("{{ messages }}", "here", {})
    assert caught.value.where == where and (found is None or caught.value.found == found)


def test_what_is_too_much_for_one_conversation() -> None:
    for text, what, limit in (
        ("{{ 'a' * 10**30 }}", "memory", "2,048 MiB"),
        ("{% for a in range(99999) %}{{ 'x' * 500000 }}{% endfor %}", "output", "1,000,256 characters"),
    ):
        with pytest.raises(ConfigError) as caught:
            SandboxedTemplate(text + "{{ messages }}", "here", {}).render(
                [{"a": "bcd"}], None, add_generation_prompt=False
            )
        assert caught.value.what == f"The chat template needs too much {what} for one conversation."
        assert (caught.value.where, caught.value.expected) == ("here", f"at most {limit}")
        assert caught.value.next_command == "another template: --chat-template mixtral, or a file"


def test_blocks_of_a_rendering_are_counted_together() -> None:
    """Two blocks of half the limit are as much as is allowed; empty blocks of generation are left out."""
    text = "{{ messages[0].a }}{{ messages[0].a }}"
    for number, length in ((500_128, 0), (500_129, 1)):
        blocks: list[Any] = ["x" * number, "x" * number]
        found = SandboxedTemplate(text, "here", {})
        found._template = SimpleNamespace(
            environment=found._template.environment, generate=lambda blocks=blocks, **_: iter(blocks)
        )
        if length:
            with pytest.raises(ConfigError, match="too much output"):
                found.render([{"a": "bcd"}], None, add_generation_prompt=False)
        else:
            assert len(found.render([{"a": "bcd"}], None, add_generation_prompt=False).text) == 1_000_256
    empty = template_of(BLOCKS.replace("BLOCK", "{{ m.content }}").replace("BEHIND", "/"))
    calls = Message("assistant", "", tool_calls=({"id": "1"},))
    conversation = empty._conversation((asked("x" * 300), calls, said("b")), ())
    assert conversation.render(3).generated == ((301, 302),)


def test_characters_and_first_lines() -> None:
    assert template_sandbox._num_characters({"abc": "d", "e": ["f", 1, None]}) == 3 + 1 + 1 + 1 + 8 + 8
    assert template_sandbox._first_line(AssertionError("a\nb")) == "AssertionError: a"
    assert template_sandbox._first_line(TooLong()) == "TooLong"


def test_a_system_without_limits_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    with template_sandbox._bounded_memory():
        rendered = True
    assert rendered


def test_a_process_of_2_gib_may_grow_by_2_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is 4 GiB and not 2, whose bits are the same."""
    asked: list[Any] = []
    monkeypatch.setattr("pathlib.Path.read_text", lambda _: "2 1 1\n")
    monkeypatch.setattr(resource, "getpagesize", lambda: 2**30)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", lambda *given: asked.append(given))
    with template_sandbox._bounded_memory():
        assert asked[0] == (resource.RLIMIT_AS, (4_294_967_296, resource.RLIM_INFINITY))
