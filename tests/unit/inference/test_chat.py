"""The commands of `chat`, and turns that do not fit into the context."""

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.inference.chat import Chat, Reply
from mixtral_run.inference.conversation import Conversation
from mixtral_run.launch.stop_request import StopRequest
from mixtral_run.train.data.reading.example import Message
from mixtral_run.train.data.reading.example_problem import ExampleProblem


class _Words:
    """STAND-IN for a chat template: a token a word, and one for each role."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        if any("forbidden" in message.content for message in messages):
            raise ExampleProblem("no such word")
        return [number for message in messages for number in range(1 + len(message.content.split()))]


class _Speaker:
    """STAND-IN for the model: it answers with what it was asked, and notes it."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int, bool]] = []
        self.stop = False
        self.replies = {0: Reply("one two three", 3, True)}

    def answer(self, row: Sequence[int], room: int, *, adapted: bool, live: bool) -> Reply:
        self.stop = False
        self.asked.append((len(row), room, adapted))
        reply = self.replies.get(len(self.asked) - 1, self.replies[0])
        if reply.text == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        print(reply.text)
        return reply


def talk(
    lines: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    context: int = 100,
    has_adapter: bool = True,
    **replies: Any,
) -> tuple[_Speaker, Conversation]:
    speaker = _Speaker()
    speaker.replies |= {int(number[1:]): reply for number, reply in replies.items()}
    conversation = Conversation(_Words(), context, 10)  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        Chat(conversation, speaker, has_adapter=has_adapter).run()  # type: ignore[arg-type]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return speaker, conversation


def test_history_reset_system_and_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "",
        "a b",
        "c",
        "/again",
        "/system be good",
        "c",
        "/system",
        '/system ""',
        "/reset",
        "x",
        "//x",
        "/quit",
        "no",
    ]
    speaker, conversation = talk(lines, monkeypatch)
    # A turn has 1 + 2 words, its answer 1 + 3; the system prompt 1 + 2. /again replaces the last turn.
    assert [length for length, _, _ in speaker.asked] == [3, 9, 9, 3 + 3 + 4 + 2 + 4 + 2, 2, 2 + 4 + 2]
    assert conversation.turns[-1][0] == "/x"
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["one two three"] * 6
    assert "(System prompt: be good)" in shown.err and "(There is no system prompt.)" in shown.err


def test_the_adapter_is_switched(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    speaker, _ = talk(["a", "/adapter off", "/again", "/adapter", "/adapter on", "/again"], monkeypatch)
    assert [adapted for _, _, adapted in speaker.asked] == [True, False, True]
    assert "(The adapter is off. /adapter on|off" in capsys.readouterr().err
    speaker, _ = talk(["/adapter off", "a"], monkeypatch, has_adapter=False)
    assert "There is no adapter" in capsys.readouterr().err


def test_the_oldest_turns_are_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A turn with its answer has 8 tokens; 10 of 40 are left for an answer.
    speaker, conversation = talk(["a b c"] * 6, monkeypatch, context=40)
    assert [length for length, _, _ in speaker.asked] == [4, 12, 20, 28, 28, 28]
    assert all(length + room <= 40 for length, room, _ in speaker.asked)
    assert len(conversation.turns) == 4
    assert capsys.readouterr().err.count("the oldest turn is left out") == 2


def test_what_cannot_be_asked_is_said_and_the_chat_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [" ".join("x" * 50), "forbidden", "/nonsense", "/again", "a"]
    speaker, conversation = talk(lines, monkeypatch, context=40)
    assert len(speaker.asked) == len(conversation.turns) == 1
    shown = capsys.readouterr().err
    assert "too long for the model's context" in shown and "51 tokens" in shown
    assert "no such word" in shown and "no command /nonsense" in shown


def test_ctrl_c_stops_an_answer_and_a_kill_the_chat(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(StopRequest, "ended_a_run", False)
    parts = {"n1": Reply("interrupted", 1, False), "n2": Reply("", 1, True), "n3": Reply("cut", 10, False)}
    _, conversation = talk(["a", "b", "c", "d", "e"], monkeypatch, **parts)
    assert [question for question, _ in conversation.turns] == ["a", "b", "d", "e"]
    shown = capsys.readouterr().err
    assert shown.splitlines() == ["(Stopped.)", "(The answer is empty; the message is not kept.)",
                                  "(The answer was cut off after 10 tokens.)"]  # fmt: skip
    assert not StopRequest.ended_a_run


def test_a_message_never_takes_the_place_of_the_answer() -> None:
    conversation = Conversation(_Words(), 12, 10)  # type: ignore[arg-type]
    assert conversation.ask("a").room == 10
    assert conversation.ask("a b c d e f g h").room == 3
    with pytest.raises(ConfigError):
        conversation.ask("a b c d e f g h i")
