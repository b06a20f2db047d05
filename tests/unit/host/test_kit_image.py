"""The image's names on a host: those that the kit brought in go with it, those that were there stay."""

import json
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("kit_image")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """STAND-IN for the engine: names and what each means; an archive holds v1 under the name kit:archive."""
    found: dict[str, str] = {}

    def run(argv: list[str], **_: object) -> Result:
        verb = " ".join(argv[1:3]) if argv[1] == "image" else argv[1]
        if verb == "image inspect" and argv[-1] in found:
            return Result(0, json.dumps([{"Id": found[argv[-1]]}]), "")
        if verb == "load":
            found["kit:archive"] = "v1"
        elif verb == "tag":
            found[argv[3]] = found[argv[2]]
        elif verb == "image rm":
            found.pop(argv[3])
        return Result(int(verb == "image inspect"), "", "")

    monkeypatch.setattr(MODULE, "run", run)
    return found


@pytest.mark.parametrize("before", [{}, {"kit:archive": "v0"}])
def test_a_name_that_came_with_the_archive_goes_with_it(
    names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    monkeypatch.setattr(MODULE, "WORK_FOLDER", str(tmp_path / "build"))
    names.update(before)
    given = {
        "host": "gpu-01",
        "source": "archive",
        "name": "kit:local",
        "archive_name": "kit:archive",
        "sent": "/a.tar",
    }
    for inputs in ("first", "second"):
        call_module(MODULE, tmp_path / "records", **given, inputs=inputs)
    assert set(names) == {"kit:local", "kit:archive"}
    assert call_module(MODULE, tmp_path / "records", **given, inputs="", state="absent")["removed"] == ["kit:local"]
    assert set(names) == set(before)
