"""The command line: spellings, suggestions, all problems at once, precedence of flags, exit codes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mixtral_run.cli.main import main, root
from mixtral_run.errors import (
    CheckFailed,
    ConfigError,
    HostError,
    MixtralRunError,
    Stopped,
    TrainingError,
    WeightsError,
)
from mixtral_run.launch import process_exit, processes


def mixtral_run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mixtral_run", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


Here = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """The command line in this process, which has torch: a verb that trains would import it twice, for three lines."""

    def called(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["mixtral-run", *words])
        monkeypatch.setattr(process_exit, "_ignore_signals", lambda _: None)
        monkeypatch.setattr(processes, "import_ahead", lambda _: None)
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return subprocess.CompletedProcess(words, ended.value.code, printed.out, printed.err)

    return called


def test_dashes_and_underscores_are_the_same(tmp_path: Path) -> None:
    for spelling in ("--hf-model-path", "--hf_model_path"):
        done = mixtral_run("convert", spelling, str(tmp_path / "none"), "--output_path", str(tmp_path / "out"))
        assert "No such option" not in done.stderr
        assert str(tmp_path / "none") in done.stderr
        assert done.returncode != 0


def test_an_unknown_flag_gets_a_suggestion() -> None:
    done = mixtral_run("convert", "--hf-modelpath", "x")
    assert done.returncode == 2
    assert "--hf-model-path" in done.stderr
    assert "Traceback" not in done.stderr


def test_all_missing_settings_are_reported() -> None:
    done = mixtral_run("finetune", "--lora-rank", "0")
    assert done.returncode == 2
    assert "--load is required" in done.stderr
    assert "--save is required" in done.stderr


def test_all_problems_of_a_command_line_are_reported_at_once() -> None:
    done = mixtral_run(
        "convert", "--tp", "2", "--hf=model", "stray", "--tensor-model-parallel-size", "two", "--workers", "0",
        "--expert_model_parallel_size", "four", "--overwrite=yes", "--ouput", "x", "--from-megatron",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "✗ Some settings are wrong.",
        "  - --tp: there is no such flag; write --tensor-model-parallel-size",
        "  - --hf: there is no such flag; did you mean --hf-model-path or --hf-home?",
        "  - --overwrite: expected no value; found 'yes'",
        "  - --ouput: there is no such flag; did you mean --output-path?",
        "  - --from-megatron: expected a value after it; found none",
        "  - 'stray': a flag before it is missing",
        "  - --tensor-model-parallel-size: expected a whole number; found 'two'",
        "  - --expert-model-parallel-size: expected a whole number; found 'four'",
        "  - --output-path is required: Folder to write, or its URL, such as s3://bucket/folder; must be empty or new.",
        "  - --workers: expected at least 1; found 0",
        "  where:    command line",
        "  next:     mixtral-run convert --help",
    ]


def test_a_verb_without_a_config_reports_them_as_well() -> None:
    done = mixtral_run("bootstrap", "gpu-01", "--chek", "--dif", "-q", "--serial")
    assert done.returncode == 2
    for words in ("--chek: there is no such flag; did you mean --check?", "--diff?", "-q:", "--serial: expected a val"):
        assert words in done.stderr


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["logs"], ["JOB is missing"]),
        (["logs", "--tail", "3"], ["JOB is missing"]),
        (["logs", "--tail", "3", "j"], []),
        (
            ["logs", "--tail=x", "--of"],
            ["--tail: expected a whole number, 0 or more; found 'x'", "--of: there is", "JOB is missing"],
        ),
        (["logs", "j", "k"], ["'k': expected nothing there"]),
        (["logs", "j", "--tail"], ["--tail: expected a value after it; found none"]),
        (["bootstrap", "-f0", "h"], ["--forks: expected a whole number, 1 or more; found '0'"]),
        (["bootstrap", "--for_ks"], ["--for-ks: there is no such flag; did you mean --forks?"]),
        (["up", "--nccl_timeout", "1h"], ["--nccl-timeout: expected a whole number; found '1h'", "[USER@]HOST"]),
        (["finetune", "--nccl_timeout"], ["--nccl-timeout: expected a value after it; found none", "--load is req"]),
    ],
)
def test_missing_arguments_and_wrong_values_are_reported_with_the_rest(words: list[str], problems: list[str]) -> None:
    error = CliRunner().invoke(root, words).exception
    found = getattr(error, "problems", ()) if isinstance(error, ConfigError) else ()
    for problem in problems:
        assert any(each.startswith(problem) for each in found), found
    if not problems:
        assert not any("expected" in each for each in found)


@pytest.mark.parametrize("flag", ["--l", "--lx", "--lr-x9-qqq", "-l"])
def test_the_first_letter_alone_gives_no_suggestion(flag: str) -> None:
    error = CliRunner().invoke(root, ["finetune", flag, "1"]).exception
    assert isinstance(error, ConfigError)
    assert f"{flag}: there is no such flag" in error.problems


def test_help_is_shown_whatever_else_is_wrong() -> None:
    shown = CliRunner().invoke(root, ["finetune", "--bogus", "--seed", "x", "--help"])
    assert (shown.exit_code, "Usage:" in shown.output) == (0, True)


def test_former_names_of_flags_and_keys_are_accepted_and_hidden(tmp_path: Path) -> None:
    for flag in ("--keep-quantised", "--keep_quantised"):
        error = CliRunner().invoke(root, ["finetune", flag, "maybe"]).exception
        assert isinstance(error, ConfigError)
        assert "--quantized-cache: expected one of yes, use, no; found maybe" in error.problems
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"keep_quantised": "maybe"}))
    for words, found in (
        ([], "quantized_cache: {}; found maybe"),
        (["--quantized-cache", "x"], "--quantized-cache: {}; found x"),
    ):
        error = CliRunner().invoke(root, ["finetune", "--config", str(file), *words]).exception
        assert isinstance(error, ConfigError)
        assert found.format("expected one of yes, use, no") in error.problems
        assert not any("keep_quantised" in each for each in error.problems)
    assert "keep-quantised" not in CliRunner().invoke(root, ["finetune", "--help"]).output
    error = CliRunner().invoke(root, ["finetune", "--keep-quantize", "no"]).exception
    assert isinstance(error, ConfigError)
    assert not any("keep-quantised" in each for each in error.problems)


@pytest.mark.parametrize(
    "words", [("pretrain", "--load", "x", "--mock-data", "--detach"), ("teardown",), ("teardown", "h", "--json")]
)
def test_an_error_of_settings_names_a_next_command(words: tuple[str, ...]) -> None:
    error = CliRunner().invoke(root, list(words), prog_name="mixtral-run").exception
    assert isinstance(error, ConfigError)
    assert error.next_command == f"mixtral-run {words[0]} --help"


def test_an_unknown_verb_gets_a_suggestion() -> None:
    done = mixtral_run("convrt", "--hf-model-path", "x")
    assert done.returncode == 2
    assert "There is no verb 'convrt'." in done.stderr
    assert "next:     mixtral-run convert\n" in done.stderr
    assert "next:     mixtral-run --help" in mixtral_run("qqq").stderr


def test_an_empty_value_is_refused() -> None:
    """It usually comes from an unset shell variable, and must become neither the current folder nor the default."""
    done = mixtral_run("convert", "--hf-model-path", "model", "--output-path", "")
    assert (done.returncode, "--output-path: expected a path; found ''" in done.stderr) == (2, True)
    done = mixtral_run("convert", "--hf-model-path", "", "--output-path", "x")
    assert (done.returncode, "--hf-model-path: expected a directory" in done.stderr) == (2, True)
    done = mixtral_run("plan", "--lora-target-modules", "")
    assert (done.returncode, "--lora-target-modules: expected one of" in done.stderr) == (2, True)


def test_a_list_may_be_given_in_parts() -> None:
    error = CliRunner().invoke(root, ["finetune", "--log-to", "nowhere,elsewhere", "--log-to", "wandb"]).exception
    assert isinstance(error, ConfigError)
    wrong = [problem for problem in error.problems if problem.startswith("--log-to")]
    assert wrong == ["--log-to: expected one of wandb, mlflow; found nowhere, elsewhere"]
    for verb in ("bootstrap", "teardown"):
        command = root.get_command(click.Context(root), verb)
        assert command is not None
        words = ["gpu-01", "--tags", "docker,swap", "--tags", "image", "--limit", "a", "--limit", "b"]
        given = command.make_context(verb, words).params
        assert (given["tags"], given["limit"]) == ("docker,swap,image", "a,b")
        assert command.make_context(verb, ["gpu-01"]).params["tags"] is None


def test_what_looks_like_a_flag_may_be_a_value(here: Here) -> None:
    done = here("generate", "--load", "nowhere", "--prompt", "--foo", "--prompt=-x", "--expert_model_parallel_size=2")
    assert "no such flag" not in done.stderr
    assert "nowhere" in done.stderr


def test_problems_of_layout_base_data_and_folder_are_reported_together(tmp_path: Path, here: Here) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "pairs.jsonl").write_text('{"instruction": 1, "response": "b"}\n')
    done = here(
        "finetune", "--load", "nowhere", "--data-path", str(tmp_path / "pairs.jsonl"), "--save", str(tmp_path),
        "--device", "cpu", "--nproc-per-node", "3", "--tensor-model-parallel-size", "2",
    )  # fmt: skip
    assert done.returncode == 5
    for words in (
        "4 things stand in the way.",
        "where:    nowhere",
        "The layout TP2 does not fit 3 processes.",
        "line 1: 'instruction': expected text; found a number",
        f"--save {tmp_path}: expected a new or empty folder",
    ):
        assert words in done.stderr


def test_flags_take_precedence_over_the_config_file(tmp_path: Path, here: Here) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"load": str(tmp_path / "base"), "save": "s", "mock_data": True, "lora_rank": 0}))
    reported = here("finetune", "--config", str(file))
    assert "  - lora_rank: expected at least 1; found 0\n" in reported.stderr
    assert f"  where:    {file}\n" in reported.stderr
    reported = here(
        "finetune",
        "--config",
        str(file),
        "--lora-rank",
        "4",
        "--tensor-model-parallel-size",
        "1",
        "--expert-model-parallel-size",
        "1",
    )
    assert "lora_rank" not in reported.stderr
    assert "There is no such folder." in reported.stderr
    assert reported.returncode == 5


def test_an_unreadable_config_file_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for file in (broken, tmp_path / "missing.json"):
        done = mixtral_run("finetune", "--config", str(file))
        assert done.returncode == 2
        assert str(file) in done.stderr


def test_debug_shows_the_traceback() -> None:
    with_it = mixtral_run("--debug", "finetune")
    assert "Traceback" in with_it.stderr
    assert with_it.returncode == 2
    assert "Traceback" not in mixtral_run("finetune").stderr


def test_a_full_disk_is_reported_without_a_traceback() -> None:
    with Path("/dev/full").open("w") as full:
        words = [sys.executable, "-m", "mixtral_run", "explain"]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert "cannot be written" in done.stderr
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_shell_completes_verbs_and_flags() -> None:
    for words, completed in (("mixtral-run convrt --hf", ""), ("mixtral-run convert --hf-m", "plain,--hf-model-path")):
        environment = {"_MIXTRAL_RUN_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "2"}
        done = mixtral_run(**environment)
        assert (done.stdout.strip(), done.stderr) == (completed, "")


def test_version() -> None:
    done = mixtral_run("--version")
    assert done.stdout.startswith("mixtral-run, version ")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("torch", ("finetune", "--load", "x", "--mock-data", "--save", "y")),
        ("torch", ("generate", "--load", "x", "--prompt", "y")),
    ],
)
def test_missing_packages_of_the_extra_are_reported_in_words(
    module: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    (tmp_path / "here").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "mixtral_run", *words],
        capture_output=True,
        text=True,
        cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"no module named '{module}'" in done.stderr
    assert "pip install '.[train]'" in done.stderr


def test_exit_codes_are_those_of_the_documentation() -> None:
    readme = (Path(__file__).parents[3] / "README.md").read_text().replace("\n", " ")
    documented = readme.split("Exit codes: ")[1].split(".")[0]
    numbers = {int(part.split()[0]): part.split(maxsplit=1)[1] for part in documented.split(", ")}
    assert numbers == {
        2: "settings or input", 3: "host", 4: "a check failed", 5: "weights", 6: "training", 130: "interrupted",
    }  # fmt: skip
    for error in (ConfigError, HostError, CheckFailed, WeightsError, TrainingError, Stopped):
        assert error.exit_code in numbers


@pytest.mark.parametrize(
    "error",
    [ConfigError("x"), HostError("x"), CheckFailed("x"), WeightsError("x"), TrainingError("x"), Stopped("x")],
)
def test_every_class_of_error_ends_the_program_with_its_code(
    error: MixtralRunError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(root, "main", fail)
    monkeypatch.setattr(process_exit, "_ignore_signals", lambda _: None)
    with pytest.raises(SystemExit) as caught:
        main()
    expected = {
        "ConfigError": 2,
        "HostError": 3,
        "CheckFailed": 4,
        "WeightsError": 5,
        "TrainingError": 6,
        "Stopped": 130,
    }
    assert caught.value.code == expected[type(error).__name__]
    assert capsys.readouterr().err == "✗ x\n"
