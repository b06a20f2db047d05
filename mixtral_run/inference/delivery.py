"""Delivery of answers in the order of their prompts: each as soon as it is complete, on a terminal token by token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TextIO

from mixtral_run.inference.answers import Answer
from mixtral_run.inference.text_stream import TextStream, printable, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Delivery:
    """Passes answers on. Rows of a batch grow together; the first one that is not delivered yet is shown live.

    Args:
        prompts: the text of each prompt, as it is shown.
        tokenizer: of the model.
        stop_ids: ids that end an answer.
        live: a terminal that gets the text token by token; None for none.
        deliver: called with the number of a prompt and its answer.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        live: TextIO | None,
        deliver: Callable[[int, Answer], None],
    ) -> None:
        self._prompts, self._tokenizer, self._stop_ids = prompts, tokenizer, stop_ids
        self._live, self._deliver = live, deliver
        self._next = 0
        self._stream: TextStream | None = None

    def skip(self, count: int) -> None:
        """Begin with prompt number `count`."""
        self._next = count

    def passed(self, first: int, outputs: Sequence[list[int]], running: Sequence[bool]) -> None:
        """Take the tokens of a batch so far. first: number of its first prompt. running: False for complete rows."""
        while self._next < first + len(outputs):
            output, ended = outputs[self._next - first], not running[self._next - first]
            self._show(output, ended)
            if not ended:
                return
            self._deliver(self._next, self.answer(self._next, output))
            self._next += 1

    def answer(self, number: int, output: list[int]) -> Answer:
        """Return the answer that the tokens are."""
        return Answer(
            prompt=self._prompts[number],
            text=text_of(output, self._tokenizer, self._stop_ids),
            num_tokens=len(output),
            finished=bool(output) and output[-1] in self._stop_ids,
        )

    def _show(self, output: list[int], ended: bool) -> None:
        if self._live is None:
            return
        text = ""
        if self._stream is None:
            self._stream = TextStream(self._tokenizer, self._stop_ids)
            text = f"\n> {self._prompts[self._next]}\n"
        text += self._stream.more(output, ended=ended)
        if ended:
            text += "\n"
            self._stream = None
        if text:
            print(printable(text), end="", file=self._live, flush=True)
