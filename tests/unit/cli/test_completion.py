"""What a shell completes: verbs, flags, hosts, choices and paths."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from mixtral_run.cli.main import VERBS, root
from mixtral_run.fleet import hosts
from mixtral_run.fleet.hosts import Host


def completed(*words: str) -> list[CompletionItem]:
    """The completions of the last word."""
    shell = ShellComplete(root, {}, "mixtral-run", "_MIXTRAL_RUN_COMPLETE")
    return shell.get_completions(list(words[:-1]), words[-1])


def values(*words: str) -> list[str]:
    return [item.value for item in completed(*words)]


def test_verbs() -> None:
    assert values("") == list(VERBS)
    assert values("ge") == ["generate"]
    assert all(item.help for item in completed(""))
    assert values("data", "") == ["check"]


def test_flags_and_choices() -> None:
    assert {"--prompt", "--prompts", "--prompts-file"} <= set(values("generate", "--prom"))
    assert values("finetune", "--base-precision", "f") == ["fp8"]
    assert values("export", "--format", "peft") == ["peft", "peft-fused"]
    assert values("serve", "--engine", "") == ["vllm", "sglang"]
    assert values("finetune", "--lora-target-modules", "linear_qkv,linear_f") == [
        "linear_qkv,linear_fc1", "linear_qkv,linear_fc2",
    ]  # fmt: skip
    # An unfinished line with a flag that does not exist completes all the same.
    assert "--temperature" in values("generate", "--nonsense", "--temp")


@pytest.mark.parametrize(
    "words", [("status", "gpu-0"), ("jobs", "gpu-0"), ("teardown", "gpu-0"), ("bootstrap", "gpu-0"), ("up", "gpu-0"),
              ("finetune", "--on", "gpu-0"), ("shell", "--on", "gpu-0"), ("logs", "--on", "gpu-0")],
)  # fmt: skip
def test_hosts_are_those_that_are_remembered(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    known = tuple(Host(name, name) for name in ("gpu-01", "gpu-02", "other"))
    monkeypatch.setattr(hosts, "remembered_hosts", lambda: known)
    assert values(*words) == ["gpu-01", "gpu-02"]


def test_several_hosts_and_a_damaged_list_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "remembered_hosts", lambda: (Host("gpu-01", "a"), Host("gpu-02", "b")))
    assert values("generate", "--on", "x,gpu") == ["x,gpu-01", "x,gpu-02"]

    def damaged() -> tuple[Host, ...]:
        raise OSError("unreadable")

    monkeypatch.setattr(hosts, "remembered_hosts", damaged)
    assert values("status", "g") == []


@pytest.mark.parametrize("flag", ["--load", "--adapter", "--save", "--data-path", "--config", "--chat-template"])
def test_paths_are_left_to_the_shell(flag: str) -> None:
    verb = "generate" if flag == "--adapter" else "finetune"
    assert [(item.type, item.value) for item in completed(verb, flag, "mi")] in ([("file", "mi")],)


def test_bash_asks_the_program(tmp_path: Path) -> None:
    """As the script of `_MIXTRAL_RUN_COMPLETE=bash_source mixtral-run` does, which docs/serving.md shows."""
    source = subprocess.run(
        [sys.executable, "-m", "mixtral_run"], capture_output=True, text=True, check=False,
        env={**os.environ, "_MIXTRAL_RUN_COMPLETE": "bash_source"},
    )  # fmt: skip
    assert "complete -o nosort -F" in source.stdout and "mixtral-run" in source.stdout, source.stderr
    asked = {"_MIXTRAL_RUN_COMPLETE": "bash_complete", "COMP_WORDS": "mixtral-run eval", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_run"], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert done.stdout.splitlines() == ["plain,evaluate"], done.stderr


@pytest.mark.parametrize(("shell", "registers"), [("zsh_source", "compdef"), ("fish_source", "complete --no-files")])
def test_other_shells_get_a_script(shell: str, registers: str) -> None:
    kind = get_completion_class(shell.removesuffix("_source"))
    assert kind is not None
    source = kind(root, {}, "mixtral-run", "_MIXTRAL_RUN_COMPLETE").source()
    assert registers in source and f"_MIXTRAL_RUN_COMPLETE={kind.name}_complete" in source
