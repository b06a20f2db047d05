"""Several steps in one process: each is checked like a module of its own, and the first that fails is the last."""

from __future__ import annotations

import os
import types
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host import step

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("host_steps")


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """host_steps with a step `put`, which writes a file and fails where its text is `bad`."""

    def main(module) -> None:
        path, text = Path(module.params["path"]), module.params["text"]
        os.environ["STEP_WAS_HERE"] = text
        module.warn("about " + text)
        if text == "bad":
            module.fail_json(msg="it is bad", code=7)
        before = path.read_text() if path.exists() else ""
        if before != text and not module.check_mode:
            path.write_text(text)
        module.exit_json(changed=before != text, diff={"before": before, "after": text})

    options = {"path": {"type": "path", "required": True}, "text": {"type": "str", "default": "plain"}}
    monkeypatch.setattr(MODULE, "KINDS", {"put": types.SimpleNamespace(OPTIONS=options, main=main)})

    def run(*texts: str | None, check_mode: bool = False, **more: object) -> dict:
        steps = [
            {"name": f"step {number}", "put": {"path": str(tmp_path / str(number)), **({"text": text} if text else {})}}
            for number, text in enumerate(texts)
        ]
        given = {"state": "present", "present": steps, "absent": [], **more}
        return call_module(MODULE, tmp_path / "records", check_mode=check_mode, **given)

    return run


def _changed(result: dict) -> list[bool]:
    return [each["changed"] for each in result["steps"]]


def test_steps_are_taken_in_order_and_tell_what_they_changed(call, tmp_path: Path) -> None:
    (tmp_path / "0").write_text("a")
    result = call("a", None)
    assert result["changed"] and _changed(result) == [False, True]
    assert [each["name"] for each in result["steps"]] == ["step 0", "step 1"]
    assert result["diff"] == [{"before": "", "after": "plain"}]
    again = call("a", None)
    assert not again["changed"] and again["diff"] == [] and _changed(again) == [False, False]


def test_the_first_that_fails_is_the_last(call, tmp_path: Path) -> None:
    result = call("a", "bad", "c")
    assert result["failed"] and result["msg"] == "it is bad" and result["code"] == 7
    assert result["step"] == "step 1" and _changed(result) == [True]
    assert (tmp_path / "0").read_text() == "a" and not (tmp_path / "2").exists()


def test_check_mode_reaches_every_step(call, tmp_path: Path) -> None:
    assert _changed(call("a", "b", check_mode=True)) == [True, True]
    assert not (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_the_state_says_which_steps(call) -> None:
    result = call("a", state="absent")
    assert result["steps"] == [] and not result["changed"]


def test_a_steps_environment_ends_with_it(call) -> None:
    call("a", "bad")
    assert "STEP_WAS_HERE" not in os.environ


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"put": {"path": "/x"}}, "A step has a name and one of put; found put"),
        ({"name": "n"}, "found name"),
        ({"name": "n", "puts": {}}, "found name, puts"),
        ({"name": "n", "put": {"path": "/x"}, "other": {}}, "found name, other, put"),
    ],
)
def test_what_is_no_step_is_refused_before_the_first(call, tmp_path: Path, wrong: dict, words: str) -> None:
    first = {"name": "first", "put": {"path": str(tmp_path / "0")}}
    result = call(present=[first, wrong])
    assert result["failed"] and words in result["msg"] and not (tmp_path / "0").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "path"), ({"path": "/x", "txt": "a"}, "txt"), ({"path": "/x", "text": None, "more": 1}, "more")],
)
def test_a_steps_options_are_checked_as_a_modules_are(call, options: dict, words: str) -> None:
    result = call(present=[{"name": "n", "put": options}])
    assert result["failed"] and result["step"] == "n" and words in result["msg"]


def test_a_step_without_an_end_is_a_problem_of_the_kit() -> None:
    code = types.SimpleNamespace(OPTIONS={}, main=lambda _module: None, __name__="nothing")
    with pytest.raises(AssertionError, match="nothing ended without a result"):
        step.run(code, {}, False, print)
