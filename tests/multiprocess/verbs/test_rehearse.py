"""The rehearsal as a command: every step, and a folder that holds something else."""

import json
from pathlib import Path

from tests.multiprocess.conftest import fresh_mixtral_run, mixtral_run


def test_rehearse(tmp_path: Path) -> None:
    work = tmp_path / "rehearsal"
    done = fresh_mixtral_run("rehearse", "--work-path", str(work), "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] and len(report["steps"]) == 7
    assert report["layout"]["tensor_model_parallel_size"] == report["layout"]["expert_model_parallel_size"] == 2
    assert report == json.loads((work / "report.json").read_text())
    assert (work / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert report["losses"][-1] < 0.2 * report["losses"][0]


def test_rehearse_leaves_other_peoples_files_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").touch()
    done = mixtral_run("rehearse", "--work-path", str(tmp_path))
    assert done.returncode == 2
    assert (tmp_path / "precious.txt").exists()
