"""`chat`: a conversation in a terminal. The first rank reads, and tells the others what to compute."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from types import FrameType

import torch
import torch.distributed as dist

from mixtral_run.config.verbs.generate import ChatConfig
from mixtral_run.errors import ConfigError
from mixtral_run.inference.channel import Channel
from mixtral_run.inference.continuation import Sampling, continue_rows
from mixtral_run.inference.conversation import Conversation
from mixtral_run.inference.decode import Decoding
from mixtral_run.inference.session import Session, open_session
from mixtral_run.inference.shared_prefix import PrefixMemory
from mixtral_run.inference.text_stream import TextStream, printable, text_of
from mixtral_run.launch.stop_request import StopRequest
from mixtral_run.launch.terminal import borrow_terminal
from mixtral_run.model.mixtral import MixtralModel
from mixtral_run.model.parallel.mesh import open_mesh
from mixtral_run.model.without_adapters import without_adapters
from mixtral_run.terminal.report import Report

HELP = """\
  /reset           forget the conversation; the system prompt stays
  /system [TEXT]   show, set or (with "") remove the system prompt
  /adapter on|off  answer with the adapter, or as the base alone
  /again           answer the last message again
  /quit            end; Ctrl-D does so, too
  /help            show this
Ctrl-C stops an answer. A message that begins with a slash is written with two."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def chat(config: ChatConfig) -> None:
    """Load the model and talk until the user ends the conversation. All ranks must call."""
    session = open_session(config)
    context = session.base.architecture.max_position_embeddings
    context = min(context, session.base.architecture.sliding_window or context)
    conversation = Conversation(session.template, context, config.max_new_tokens, config.system or "")
    with open_mesh(config) as mesh:
        report = Report() if mesh.is_first else Report.silent()
        for warning in session.warnings:
            report.warn(warning)
        report.say(f"Chat template: {session.template.describe()}")
        model = session.load(config, mesh, report)
        speaker = Speaker(config, session, model)
        if mesh.is_first:
            borrow_terminal()
            Chat(conversation, speaker, has_adapter=session.adapter is not None).run()
            speaker.end()
        else:
            # Signals reach all processes, and the first rank decides what they mean.
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
            speaker.follow()


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer. is_complete: it ended by itself, neither by the user nor by the number of tokens."""

    text: str
    num_tokens: int
    is_complete: bool


class Speaker:
    """The model of a chat. The first rank calls `answer` and `end`; all others are in `follow` meanwhile."""

    def __init__(self, config: ChatConfig, session: Session, model: MixtralModel) -> None:
        self._config, self._session, self._model = config, session, model
        self._mesh = model.mesh
        self._channel = Channel(self._mesh)
        self._memory, self._adapted = PrefixMemory(), True
        self.stop = False
        """Set by a signal on the first rank: the answer ends."""

    def answer(self, row: Sequence[int], room: int, *, adapted: bool, live: bool) -> Reply:
        """Return the answer to a prompt of at most `room` tokens. live: print it as it comes."""
        self._channel.send({"row": list(row), "room": room, "adapted": adapted})
        self.stop = False
        stop_ids = self._session.template.stop_ids
        stream = TextStream(self._session.tokenizer, stop_ids)

        def show(outputs: Sequence[list[int]], running: Sequence[bool]) -> None:
            text = stream.more(outputs[0], ended=not running[0])
            if live and text:
                print(printable(text), end="", flush=True)

        output = self._continue(row, room, adapted, show)
        show([output], [False])
        text = text_of(output, self._session.tokenizer, stop_ids)
        if live:
            print(flush=True)
        else:
            print(text, flush=True)
        return Reply(text, len(output), bool(output) and output[-1] in stop_ids)

    def end(self) -> None:
        """Let the other ranks end."""
        self._channel.send({"over": True, "stopped": StopRequest.ended_a_run})

    def follow(self) -> None:
        """Compute what the first rank asks for, until it ends."""
        while not (order := self._channel.receive()).get("over"):
            self._continue(order["row"], order["room"], order["adapted"], None)
        StopRequest.ended_a_run |= order["stopped"]

    def _continue(self, row: Sequence[int], room: int, adapted: bool, show: object) -> list[int]:
        sampling = dataclasses.replace(Sampling.of(self._config), max_new_tokens=room)
        if adapted != self._adapted:
            self._memory.forget()
            self._adapted = adapted
        with nullcontext() if adapted else without_adapters(self._model):
            return continue_rows(
                self._model,
                [row],
                self._session.template.stop_ids,
                sampling,
                show,  # type: ignore[arg-type]
                None if self._config.cuda_graphs else Decoding,
                self._stopped,
                # The conversation so far is not computed again.
                self._memory,
            )[0]

    def _stopped(self) -> bool:
        """Return True on all ranks once the user stops the answer. All ranks must call."""
        flag = torch.tensor(float(self.stop))
        if self._mesh.world_size > 1:
            dist.broadcast(flag, src=0)
        return bool(flag)


class _Ended(BaseException):
    """Raised in the middle of reading by SIGTERM or SIGHUP."""


class Chat:
    """The conversation at the terminal, or from standard input line by line."""

    def __init__(self, conversation: Conversation, speaker: Speaker, *, has_adapter: bool) -> None:
        self._conversation, self._speaker, self._has_adapter = conversation, speaker, has_adapter
        self._adapted = has_adapter
        self._last: str | None = None
        self._reading = self._over = False
        self._live = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        """Talk until /quit, the end of the input, or SIGTERM."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        if self._live:
            self._enable_editing()
            print("Write a message. /help lists the commands; Ctrl-C stops an answer, Ctrl-D ends.", flush=True)
        while not self._over:
            line = self._read()
            if line is None:
                break
            if line.strip():
                self._take(line)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number != signal.SIGINT:
            self._over = StopRequest.ended_a_run = True
        self._speaker.stop = True
        if self._reading:
            raise KeyboardInterrupt if number == signal.SIGINT else _Ended

    @staticmethod
    def _enable_editing() -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - input() uses it

    def _read(self) -> str | None:
        """Return the next line, None at the end."""
        while True:
            try:
                self._reading = True
                if self._live:
                    return input("> ")
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            except KeyboardInterrupt:
                print("\n(to end: /quit or Ctrl-D)", flush=True)
            except EOFError:
                print(flush=True)
                return None
            except _Ended:
                return None
            finally:
                self._reading = False

    def _take(self, line: str) -> None:
        if line.startswith("/") and not line.startswith("//"):
            self._command(line)
        else:
            self._answer(line[1:] if line.startswith("//") else line)

    def _command(self, line: str) -> None:
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        conversation = self._conversation
        if word in ("/quit", "/exit"):
            self._over = True
        elif word == "/help":
            print(HELP, flush=True)
        elif word == "/reset":
            conversation.turns.clear()
            self._note("The conversation begins anew.")
        elif word == "/system":
            if rest:
                conversation.system = "" if rest == '""' else rest
            self._note(f"System prompt: {conversation.system}" if conversation.system else "There is no system prompt.")
        elif word == "/adapter":
            self._switch(rest)
        elif word == "/again":
            if self._last is None:
                self._note("There is no message yet.")
                return
            if conversation.turns and conversation.turns[-1][0] == self._last:
                conversation.turns.pop()
            self._answer(self._last)
        else:
            self._note(f"There is no command {word}. /help lists the commands.")

    def _switch(self, wanted: str) -> None:
        if not self._has_adapter:
            self._note("There is no adapter; chat --adapter ADAPTER gives one.")
        elif wanted in ("on", "off"):
            self._adapted = wanted == "on"
            self._note(f"The adapter is {wanted}. /again answers the last message again.")
        else:
            self._note(f"The adapter is {'on' if self._adapted else 'off'}. /adapter on|off switches it.")

    def _answer(self, text: str) -> None:
        self._last = text
        try:
            question = self._conversation.ask(text)
        except ConfigError as error:
            self._note(str(error))
            return
        if question.num_dropped:
            turns = "turn is" if question.num_dropped == 1 else f"{question.num_dropped} turns are"
            self._note(f"The conversation is longer than the model's context: the oldest {turns} left out.")
        reply = self._speaker.answer(question.row, question.room, adapted=self._adapted, live=self._live)
        if reply.text:
            self._conversation.add(text, reply.text)
        if self._speaker.stop:
            self._note("Stopped." if reply.text else "Stopped; the message is not kept.")
        elif not reply.text:
            self._note("The answer is empty; the message is not kept.")
        elif not reply.is_complete:
            self._note(f"The answer was cut off after {reply.num_tokens:,} tokens.")

    def _note(self, text: str) -> None:
        """Print a remark that is no answer: to standard error unless this is a terminal."""
        print(f"({text})", file=sys.stdout if self._live else sys.stderr, flush=True)
