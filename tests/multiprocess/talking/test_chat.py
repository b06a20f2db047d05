"""`chat` in a terminal: two ranks on gloo, answers as HF's greedy ones, Ctrl-C and Ctrl-D."""

import re
import subprocess
import sys

import pexpect

from tests.multiprocess.conftest import environment_of
from tests.multiprocess.talking.conftest import Adapted, rendered

COUNT = 24
PROMPT = "\r\n> "


def said(text: str) -> str:
    """What a terminal shows of an answer: no control characters."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def test_a_conversation_in_a_terminal(adapted: Adapted) -> None:
    words = ["-m", "mixtral_run", "chat", "--load", str(adapted.base), "--adapter", str(adapted.adapter), "--device",
             "cpu", "--max-new-tokens", str(COUNT), "--nproc-per-node", "2"]  # fmt: skip
    child = pexpect.spawn(
        sys.executable, words, env=environment_of(TERM="dumb", PYTHONUTF8="1"), encoding="utf-8", timeout=90,
        dimensions=(50, 500), codec_errors="strict",
    )  # fmt: skip

    def ask(line: str) -> str:
        child.sendline(line)
        child.expect_exact(line + "\r\n")
        child.expect_exact(PROMPT)
        return str(child.before).replace("\r\n", "\n").partition("\n(")[0]

    child.expect_exact(PROMPT)
    first = adapted.merged.greedy(rendered([("Grüße!", None)]), COUNT)
    assert ask("Grüße!") == said(first)
    turns = [("Grüße!", first), ("And now?", None)]
    assert ask("And now?") == said(adapted.merged.greedy(rendered(turns), COUNT)), "the history is part of the prompt"
    ask("/adapter off")
    off = ask("/again")
    assert off == said(adapted.hf.greedy(rendered(turns), COUNT)) and off != said(
        adapted.merged.greedy(rendered(turns), COUNT)
    )
    ask("/reset")
    ask("/adapter on")
    ask("/system Be brief.")
    with_system = adapted.merged.greedy(rendered([("Hi", None)], "Be brief."), COUNT)
    assert ask("Hi") == said(with_system)

    # Ctrl-C at the prompt changes nothing, and both ranks go on.
    child.sendintr()
    child.expect_exact("(to end: /quit or Ctrl-D)")
    child.expect_exact(PROMPT)
    # In the middle of an answer it ends the answer alone.
    child.sendline("Tell me more.")
    child.expect_exact("Tell me more.\r\n")
    child.expect(r"\S")
    child.sendintr()
    child.expect_exact("(Stopped")
    child.expect_exact(PROMPT)
    ask("/reset")
    assert ask("Hi") == said(with_system)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert (child.exitstatus, child.signalstatus) == (0, None)


def test_answers_to_lines_of_a_pipe_are_all_that_standard_output_has(adapted: Adapted) -> None:
    words = ["-m", "mixtral_run", "chat", "--load", str(adapted.base), "--adapter", str(adapted.adapter), "--device",
             "cpu", "--max-new-tokens", str(COUNT), "--nproc-per-node", "1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words], input=b"Hi\n", env=environment_of(PYTHONUTF8="1"), capture_output=True,
        check=False, timeout=90,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert said(done.stdout.decode().strip()) == said(adapted.merged.greedy(rendered([("Hi", None)]), COUNT).strip())
    assert "Chat template: " in done.stderr.decode() and "Loaded " in done.stderr.decode()
