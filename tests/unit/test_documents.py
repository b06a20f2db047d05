"""The documents against the code: commands, paths, functions, figures and versions that they name exist as named."""

import ast
import dataclasses
import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from mixtral_run import __version__
from mixtral_run.cli.command import PROBLEMS
from mixtral_run.cli.config_template import CONFIGS
from mixtral_run.cli.main import VERBS, root
from mixtral_run.cli.setting_option import BY_FLAG
from tests.support.examples import examples_of
from tests.support.samples import instruct_form

ROOT = Path(__file__).parents[2]
# Lab notes are a diary: they name commands and files as they were.
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/concepts/*.md"))
)
NAMED = [name for name in DOCUMENTS if name != "CHANGELOG.md"]
SHOWN = [*NAMED, *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "roles").glob("*/README.md"))]
"""Documents whose commands are checked."""
ROOMS = sorted(
    str(path.parent.relative_to(ROOT))
    for path in (ROOT / "mixtral_run").rglob("__init__.py")
    if path.parent != ROOT / "mixtral_run"
)
PATH = re.compile(
    r"(?<![\w./-])(?:mixtral_run|roles|playbooks|plugins|tests|benchmarks|docs|inventory)/[\w.*/-]*[\w*/]|"
    r"(?<![\w./-])[\w-]+\.(?:md|toml|cfg)\b"
)
FUNCTION = re.compile(r"(mixtral_run/[\w/]+\.py):([A-Za-z_]\w*(?:\.\w+)?)")
# Files that a run, a user or a placeholder names.
ELSEWHERE = re.compile(r"NAME|inventory/hosts\.yml")


def test_the_lists_of_tasks_are_current() -> None:
    scope = runpy.run_path(str(ROOT / "docs/make_task_lists.py"))
    assert text_of("docs/tasks.md") == scope["page"](), "run python docs/make_task_lists.py"


def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(program: str) -> list[str]:
    """Return the indented or quoted commands of all documents that begin with `program`, without their comments."""
    found: list[str] = []
    for document in SHOWN:
        text = text_of(document)
        found += re.findall(rf"^    (?:\$ )?({program} .*)$", text, re.MULTILINE)
        found += re.findall(rf"`({program} [^`\n]*(?:\n[^`\n]*)?)`", text)
    # In a table a bar is escaped.
    return sorted({re.sub(r"\s+#.*$", "", command).replace("\\|", "|").replace("\n", " ").strip() for command in found})


GROUPS = ("data",)
"""Verbs that have verbs of their own."""


def kit_commands() -> list[str]:
    """Return the kit's commands; a mention such as `mixtral-run VERB --help` or `mixtral-run rehearse` is none."""
    found = [command for command in commands("mixtral-run") if command.split()[1] in VERBS and "…" not in command]
    return [command for command in found if len(command.split()) > (3 if command.split()[1] in GROUPS else 2)]


def parsed(command: str) -> click.Context:
    """Parse a command without running it. Raises UsageError for an unknown flag or a value of the wrong kind."""
    words = shlex.split(command)[1:]
    verb = root.get_command(click.Context(root), words[0])
    if isinstance(verb, click.Group):
        verb = verb.get_command(click.Context(verb), words.pop(1))
    assert verb is not None, words[0]
    context = verb.make_context(words[0], words[1:], parent=click.Context(root, **root.context_settings))
    # A missing argument raises; unknown flags and values of the wrong kind are collected.
    if context.meta[PROBLEMS]:
        raise click.UsageError("; ".join(context.meta[PROBLEMS]))
    return context


def test_there_are_commands() -> None:
    assert len(kit_commands()) > 25
    assert len(commands("python -m")) > 30
    assert len(commands("make")) >= 5


@pytest.mark.parametrize("command", kit_commands())
def test_the_command_line_takes_it(command: str) -> None:
    context = parsed(command)
    config = CONFIGS.get(str(context.info_name))
    if config is not None and "[" not in command:
        # Its settings go together, too; a placeholder such as HOST is a value like others.
        names = {item.name for item in dataclasses.fields(config)}
        given = {name.removesuffix(BY_FLAG): value for name, value in context.params.items() if value}
        config.from_mapping({name: value for name, value in given.items() if name in names}).check()


TESTED = ("mixtral-run", "python -m", "torchrun", "make", "pip", "pipx")
"""Beginnings of the commands that the tests here check; those of torchrun: test_guide_commands.py."""
TESTED_ELSEWHERE = {
    "bash_source": "tests/unit/cli/test_completion.py",
    "zsh_source": "tests/unit/cli/test_completion.py",
    "fish_source": "tests/unit/cli/test_completion.py",
    "ANSIBLE_CONFIG=": "tests/unit/fleet/test_vault_passwords.py",
    "collection build": "tests/unit/host/role_files/test_collection.py",
    "collection install": "tests/unit/host/role_files/test_collection.py",
}
"""What names other commands of the documents, and the file of the test that runs them."""
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:mixtral-run|python3?|pipx?|torchrun|make|eval|ansible[\w-]*|docker|kubectl|sbatch|srun|curl|"
    r"wget|git|sudo|apt-get|apt|source|vllm|hf) "
)


def test_no_command_escapes() -> None:
    """Each indented line that begins with a program is one of the commands that a test runs or checks."""
    escaped = []
    for document in SHOWN:
        for line in re.findall(r"^    (\S.*)$", text_of(document), re.MULTILINE):
            command = re.sub(r"\s+#.*$", "", line).removeprefix("$ ").strip().removeprefix(".venv/bin/")
            if PROGRAM.match(command) and not command.startswith(tuple(f"{begin} " for begin in TESTED)):
                names = [name for name in TESTED_ELSEWHERE if name in command]
                if not any(all(word in text_of(TESTED_ELSEWHERE[name]) for word in name.split()) for name in names):
                    escaped.append(f"{document}: {command}")
    assert escaped == []


def test_a_command_with_an_unknown_flag_is_found() -> None:
    with pytest.raises(click.UsageError):
        parsed("mixtral-run plan --gpus 8 --gpu-memmory 32")


FOREIGN_FLAGS = {
    "--container-image",
    "--nv",
    "--signal",
    "--test-only",
    "--list-tasks",
    "--from-file",
    "--from-env-file",
    "--recursive",
    "--selector",
    "--start-at-task",
    "--extra-index-url",
    "--index-url",
    "--no-build-isolation",
    "--no-deps",
    "--require-hashes",
    "--max-lora-rank",
    "--max-model-len",
    "--layers",
    "--hidden-size",
    "--ffn-hidden-size",
    "--learning-rate",
    "--output-dir",
    "--per-device-train-batch-size",
}
"""Flags of pip, vLLM, Ansible, the benchmarks and other trainers."""


@pytest.mark.parametrize("document", NAMED)
def test_flags_exist(document: str) -> None:
    """Every flag that the text mentions is one of a verb; those of the modules' commands are tested below."""
    text = re.sub(r"`(?:python -m|mypy) [^`]*`", "", text_of(document))
    group = click.Context(root)
    options = [*root.params]
    for verb in VERBS:
        command_of_verb = root.get_command(group, verb)
        assert command_of_verb is not None
        options += command_of_verb.params
    known = {flag for option in options for flag in (*option.opts, *option.secondary_opts)} | {"--help", "--version"}
    mentioned = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)}
    assert mentioned <= known | FOREIGN_FLAGS


@pytest.mark.parametrize("command", commands("python -m"))
def test_the_module_takes_its_flags(command: str) -> None:
    """The module exists, and each flag is declared in it or in the modules of its folder."""
    words = shlex.split(command)[2:]
    if words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words[1:])
        return
    file = ROOT / (words[0].replace(".", "/") + ".py")
    assert file.is_file()
    declared = "\n".join(path.read_text(encoding="utf-8") for path in file.parent.glob("*.py"))
    for flag in words[1:]:
        assert not flag.startswith("--") or f'"{flag}"' in declared, flag


@pytest.mark.parametrize("command", commands("make"))
def test_the_makefile_has_the_target(command: str) -> None:
    target = shlex.split(command)[1]
    assert re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE), target


@pytest.mark.parametrize("command", [*commands("pip"), *commands("pipx")])
def test_what_is_installed_is_declared(command: str) -> None:
    assert shlex.split(command)[1] in ("install", "download")
    extras = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    for extra in re.findall(r"\[(\w+)\]", command):
        assert extra in extras


@pytest.mark.parametrize("document", NAMED)
def test_paths_exist(document: str) -> None:
    """Every path below a top folder, and every link, is there."""
    text = text_of(document)
    for name in PATH.findall(text):
        if not ELSEWHERE.search(name):
            in_root, beside = ROOT.glob(name.rstrip("/")), (ROOT / document).parent / name
            assert any(in_root) or beside.exists(), name
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or ((ROOT / document).parent / link).exists(), link


@pytest.mark.parametrize(
    ("file", "name"), sorted({found for document in NAMED for found in FUNCTION.findall(text_of(document))})
)
def test_functions_exist(file: str, name: str) -> None:
    body: list[ast.stmt] = ast.parse(text_of(file)).body
    for part in name.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = next((each for each in body if isinstance(each, kinds) and each.name == part), None)
        assert found is not None, f"{file} has no {name}"
        body = found.body


def test_the_walks_name_functions() -> None:
    walks = text_of("docs/architecture.md").split("## Walk ")[1:]
    assert len(walks) == 5
    assert all(len(FUNCTION.findall(walk)) >= 6 for walk in walks)


@pytest.mark.parametrize("room", ROOMS)
def test_the_map_has_every_room(room: str) -> None:
    assert f"| `{room}/` |" in text_of("docs/architecture.md")


def test_the_map_answers_ten_questions() -> None:
    section = text_of("docs/architecture.md").split("## Ten questions")[1].split("## ")[0]
    rows = [line for line in section.splitlines() if "? |" in line]
    assert len(rows) == 10
    assert all(PATH.search(row.split("|")[2]) for row in rows)


def test_the_index_leads_to_every_document() -> None:
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)]+)\)", text_of("docs/index.md"))}
    assert linked >= {ROOT / name for name in DOCUMENTS if name != "docs/index.md"}


@pytest.mark.parametrize(("document", "most"), [("README.md", 150), ("docs/benchmarks.md", 150)])
def test_length(document: str, most: int) -> None:
    assert len(text_of(document).splitlines()) <= most


@pytest.mark.parametrize("document", ["README.md", "docs/formats.md"])
def test_training_data_are_taken_as_they_are_shown(document: str, tmp_path: Path, llama_like_tokenizer: Any) -> None:
    """Also, the rows below them in formats.md are what the chat template makes of them."""
    text = text_of(document)
    lines = re.findall(r'^    (\{"(?:instruction|messages)".*\})$', text, re.MULTILINE)
    whole = [line for line in lines if "…" not in line]
    data = tmp_path / "shown.jsonl"
    data.write_text("\n".join(whole), encoding="utf-8")
    pairs = examples_of(data)
    assert len(pairs) == len(whole) == (1 if document == "README.md" else 2)
    if document == "README.md":
        return
    shown = re.sub(r"^    ", "", text, flags=re.MULTILINE)
    for pair in pairs:
        row = llama_like_tokenizer.decode(instruct_form(llama_like_tokenizer).encode(pair).tokens.tolist())
        assert re.sub(r"(<s>|</s>) *", r"\1", row) in shown, row


def test_the_readme_names_every_verb() -> None:
    rows = [line.split("|")[1] for line in text_of("README.md").splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`([a-z]+)(?: check)?`", row)} == set(VERBS)


def test_every_dependency_has_a_reason() -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    declared = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[\[<>=]", each)[0] for each in declared} - {"mixtral-run"}
    rows = [line.split("|")[1] for line in text_of("docs/dependencies.md").splitlines() if line.startswith("| ")]
    # cuda-bindings comes with torch.
    assert {name.strip() for row in rows[1:] for name in row.split(",")} == names | {"cuda-bindings"}


def figure(record: dict[str, Any]) -> str:
    """Return a record's figure as the table has it, such as `9,429 tok/s, 101.0 GiB`."""
    memory = record["peak_memory_gib"]
    return f"{record['value']:,} {record['unit']}" + (f", {memory} GiB" if memory else "")


def row_of(record: dict[str, Any]) -> str:
    """Return the table's row for a record of the GPU lane."""
    rival = record["rival"]
    beside = "–"
    if rival is not None:
        other = rival["date"] if rival["date"] != record["date"] else "another run"
        beside = f"{rival['name']}: {figure(rival)}" + ("" if rival["same_run"] else f" ({other})")
    cells = (record["case"], record["machine"], f"`{record['command']}`", figure(record), beside, record["date"])
    return f"| {' | '.join(cells)} |"


def test_the_benchmarks_are_the_records_of_the_gpu_lane() -> None:
    records = json.loads(text_of("docs/lab_notes/2026-11-gpu.json"))
    section = text_of("docs/benchmarks.md").split("## GPUs")[1].split("## ")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(records) > 30
    assert all(
        {"machine", "commit", "date", "command", "metric", "value", "unit", "rival"} <= set(each) for each in records
    )
    assert table[1:] == [row_of(record) for record in records]


def test_version_and_license_agree() -> None:
    releases = re.findall(r"^## (\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert releases[0] == __version__
    assert "Apache License\n                           Version 2.0, January 2004" in text_of("LICENSE")
    assert tomllib.loads(text_of("pyproject.toml"))["project"]["license"] == "Apache-2.0"
    for file in sorted(ROOT.glob("roles/*/meta/main.yml")):
        assert yaml.safe_load(file.read_text(encoding="utf-8"))["galaxy_info"]["license"] == "Apache-2.0", file


def test_the_changelog_is_by_release_and_kind() -> None:
    """Each entry stands under one of the four kinds, on one line."""
    kinds = re.findall(r"^### (.*)$", text_of("CHANGELOG.md"), re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Fixed", "Security"}
    for line in text_of("CHANGELOG.md").splitlines():
        assert not line.startswith("  "), f"an entry of several lines: {line}"
