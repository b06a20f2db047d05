"""`mixtral-run rehearse --host` from an installed wheel finds every file that it needs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from mixtral_run.fleet import rehearse_host
from mixtral_run.fleet.testhosts.shell import TargetError, call

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the unpacked wheel and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(argv, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_of_the_throwaway_hosts(installed: Path) -> None:
    argv = ["git", "ls-files", "mixtral_run/fleet/testhosts"]
    tracked = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {Path(name).parent.name for name in tracked} >= {"testhosts", "files", "molecule"}
    assert [name for name in tracked if not (installed / name).is_file()] == []


def test_the_image_is_built_from_the_files_of_the_wheel(installed: Path) -> None:
    program = (
        "from mixtral_run.fleet.testhosts import image, kit_image as kit\n"
        "for each in (kit.DOCKERFILE, kit.REQUIREMENTS, kit.CONSTRAINTS, kit.PACKAGE / '__main__.py',\n"
        "             image.FILES / 'repack.sh'):\n"
        "    assert each.is_file(), each\n"
        "    print(each)\n"
        "assert any(line.startswith('torch==') for line in kit.pinned(None))\n"
    )
    # -P keeps the current folder out of sys.path.
    argv = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(installed)!r})\n{program}"]
    done = subprocess.run(argv, cwd=installed, check=True, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 5
    assert all(line.startswith(f"{installed}/mixtral_run/") for line in done.stdout.splitlines())


def test_an_engine_is_all_that_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearse_host, "program_answers", lambda *argv: argv == ("docker", "info"))
    assert rehearse_host.why_not() is None
    monkeypatch.setattr(rehearse_host, "program_answers", lambda *_: False)
    assert rehearse_host.why_not() == "no Docker engine answers here"


def test_a_missing_program_is_an_error_in_words() -> None:
    with pytest.raises(TargetError, match="no-such-program is not installed here"):
        call("no-such-program")
