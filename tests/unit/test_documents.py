"""Every command in the documents is one that the command line takes: its verb, its flags, its values."""

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest

from mixtral_run.cli.command import PROBLEMS
from mixtral_run.cli.main import VERBS, root
from mixtral_run.train.data.examples import read_examples
from mixtral_run.train.data.prompt import encode_conversation

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/fleet.md", "docs/formats.md", "docs/benchmarks.md")


def commands() -> list[str]:
    """The indented or quoted `mixtral-run VERB …` of all documents, without what follows two spaces and a hash."""
    found: list[str] = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        found += [
            re.sub(r"\s+#.*$", "", line).strip() for line in re.findall(r"^    mixtral-run .*$", text, re.MULTILINE)
        ]
        found += [each for each in re.findall(r"`(mixtral-run [a-z][^`]*)`", text) if each.split()[1] in VERBS]
    return found


def test_there_are_commands() -> None:
    assert len(commands()) > 12


@pytest.mark.parametrize("command", commands())
def test_the_command_line_takes_it(command: str) -> None:
    words = shlex.split(command)[1:]
    verb = root.get_command(click.Context(root), words[0])
    assert verb is not None, words[0]
    # Nothing is run. A missing argument raises; unknown flags and values of the wrong kind are collected.
    context = verb.make_context(words[0], words[1:], parent=click.Context(root, **root.context_settings))
    assert not context.meta[PROBLEMS]


@pytest.mark.parametrize("document", ["README.md", "docs/formats.md"])
def test_training_data_are_taken_as_they_are_shown(document: str, tmp_path: Path, llama_like_tokenizer: Any) -> None:
    """And become the rows that stand below them."""
    text = (ROOT / document).read_text(encoding="utf-8")
    lines = re.findall(r'^    (\{"(?:instruction|messages)".*\})$', text, re.MULTILINE)
    whole = [line for line in lines if "…" not in line]
    data = tmp_path / "shown.jsonl"
    data.write_text("\n".join(whole), encoding="utf-8")
    pairs = read_examples(data)
    assert len(pairs) == len(whole) == (1 if document == "README.md" else 2)
    if document == "README.md":
        return
    shown = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    for pair in pairs:
        turns = encode_conversation(llama_like_tokenizer, pair.turns)
        row = "".join(
            f"{llama_like_tokenizer.decode(prompt).strip()} {llama_like_tokenizer.decode(answer).strip()}"
            for prompt, answer in turns
        )
        assert re.sub(r"<s> *", "<s>", row) in shown, row


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    told = {verb for verb in VERBS if re.search(rf"mixtral-run {verb}\b|\| `{verb}` \|", text)}
    assert told >= set(VERBS) - {"up", "jobs", "logs", "stop"}
