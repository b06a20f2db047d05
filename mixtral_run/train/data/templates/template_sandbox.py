"""Rendering of Jinja templates in the sandbox of Transformers, bounded in time, memory and size of the output.

A template comes with a model, from people whom nobody has checked. The sandbox keeps it from files and from Python;
the bounds keep it from stopping the machine.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from mixtral_run.errors import ConfigError, MixtralRunError

SECONDS, GROWTH_BYTES = 5.0, 2 * 1024**3
"""Processor time and additional memory of one conversation's renderings; a usual one takes a millisecond."""
LONGEST_TEMPLATE = 1_000_000
"""Characters of a template; the longest of released models has 20,000."""


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class TemplateFailed(ValueError):
    """A template that cannot render a conversation; the text is the reason."""


class TooLong(BaseException):
    """Raised inside a rendering whose time is up; no handler of Exception on the way may stop it."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation. generated: [begin, end) of the characters in `{% generation %}` blocks."""

    text: str
    generated: tuple[tuple[int, int], ...]


class SandboxedTemplate:
    """A Jinja template, compiled by Transformers.

    Args:
        text: the template.
        where: its file, for errors.
        special_tokens: texts of the tokenizer's special tokens, such as `bos_token`, which templates use as variables.

    has_generation: the template marks what is learned with `{% generation %}` blocks.

    Raises:
        ConfigError: the template is not valid Jinja, or reads no messages.
    """

    def __init__(self, text: str, where: str, special_tokens: Mapping[str, Any]) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        if len(text) > LONGEST_TEMPLATE:
            raise ConfigError(
                "The chat template is too long.",
                where=where,
                expected=f"at most {LONGEST_TEMPLATE:,} characters",
                found=f"{len(text):,}",
            )
        if "messages" not in text:
            raise ConfigError(
                "This is not a chat template.",
                where=where,
                expected="a Jinja template that writes `messages`",
                found=repr(text[:60]),
            )
        self.has_generation = _GENERATION.search(text) is not None
        self._special_tokens, self._where = dict(special_tokens), where
        try:
            with _bounded():
                self._template: Any = _compile_jinja_template(text)
        except (Exception, TooLong) as error:
            # Jinja compiles a template to Python, and can fail in any way that Python's compiler can.
            line = getattr(error, "lineno", None)
            raise ConfigError(
                "The chat template is not a valid Jinja template.",
                where=f"{where}, line {line}" if line else where,
                found=_first_line(error),
            ) from error

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Bound time and memory of the renderings within. Raises ConfigError if they are exceeded."""
        try:
            with _bounded():
                yield
        except TooLong as error:
            raise self._excess("time", f"{SECONDS:g} seconds") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
    ) -> Rendered:
        """Render a conversation as `apply_chat_template` does.

        Raises:
            TemplateFailed: the template cannot write this conversation.
            ConfigError: it writes far more than the conversation has, or needs too much memory.
        """
        longest = 1_000_000 + 64 * sum(map(_num_characters, [*messages, *(tools or ())]))
        blocks: list[str] = []
        generated: list[tuple[int, int]] = []
        length = 0
        try:
            with self._template.environment.activate_tracker(blocks, generated):
                for block in self._template.generate(
                    messages=messages,
                    tools=tools,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                ):
                    blocks.append(block)
                    length += len(block)
                    if length > longest:
                        raise self._excess("output", f"{longest:,} characters")
        except MixtralRunError:
            raise
        except (MemoryError, OverflowError) as error:
            raise self._excess("memory", f"{GROWTH_BYTES // 1024**2:,} MiB") from error
        except Exception as error:
            # A template can fail in any way that Python code can.
            raise TemplateFailed(_first_line(error)) from error
        return Rendered("".join(blocks), tuple(sorted((begin, end) for begin, end in generated if end > begin)))

    def _excess(self, what: str, limit: str) -> ConfigError:
        return ConfigError(
            f"The chat template needs too much {what} for one conversation.",
            where=self._where,
            expected=f"at most {limit}",
            next_command="another template: --chat-template mixtral, or a file",
        )


def _first_line(error: BaseException) -> str:
    """Return the message of a template's own `raise_exception` as it is, and the kind of other errors."""
    words = (str(error).splitlines() or [""])[0][:200]
    kind = type(error).__name__
    return words if kind == "TemplateError" and words else f"{kind}: {words}" if words else kind


def _num_characters(value: object) -> int:
    if isinstance(value, Mapping):
        return sum(_num_characters(key) + _num_characters(each) for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(_num_characters, value))
    return len(value) if isinstance(value, str) else 8


@contextmanager
def _bounded() -> Iterator[None]:
    with _bounded_memory(), _bounded_time():
        yield


@contextmanager
def _bounded_time() -> Iterator[None]:
    """Raise TooLong after SECONDS of processor time. Only the main thread of a process can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, interrupt)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _bounded_memory() -> Iterator[None]:
    """Let allocations fail with MemoryError that would add more than GROWTH_BYTES to this process. Linux only."""
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = pages * resource.getpagesize() + GROWTH_BYTES
        limits = [wanted, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
