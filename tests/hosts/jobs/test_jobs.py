"""Jobs in real containers of a real engine, over a real sshd. Only the program in the image is a stand-in."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError, HostError, TrainingError
from mixtral_run.fleet.jobs.fetch import fetch, fetch_job
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_log import JobFollower, Left, show_logs
from mixtral_run.fleet.jobs.job_spec import JobOptions, make_spec
from mixtral_run.fleet.jobs.jobs import RunningJob, engine, find_job, list_jobs, start, stop
from mixtral_run.fleet.jobs.taking import BUSY, BusyError, start_argv
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.testhosts.image import host_image
from mixtral_run.fleet.testhosts.shell import call
from tests.hosts.conftest import HostMaker, seen_arguments

FILES = Path(__file__).parents[1] / "files"
IMAGE = "mixtral-run-test-job:latest"


@pytest.fixture(scope="session")
def image(docker_engine: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    context = tmp_path_factory.mktemp("image")
    (context / "mixtral-run").write_bytes((FILES / "mixtral-run").read_bytes())
    (context / "mixtral-run").chmod(0o755)
    (context / "Dockerfile").write_text(f"FROM {host_image('bookworm')}\nCOPY mixtral-run /usr/local/bin/mixtral-run\n")
    call("docker", "build", "--tag", IMAGE, context)
    return IMAGE


@pytest.fixture
def options(image: str, light_hosts: HostMaker, tmp_path: Path) -> Iterator[JobOptions]:
    (host,) = light_hosts(1)
    for folder in ("checkpoints, and more", "hf"):
        (tmp_path / folder).mkdir()
    yield JobOptions(
        on=(host.target,), image=image, shm_size="64m", ulimits=("none",),
        checkpoints_folder=str(tmp_path / "checkpoints, and more"), hf_home=str(tmp_path / "hf"),
    )  # fmt: skip
    left = call("docker", "ps", "--all", "--quiet", "--filter", f"ancestor={image}").split()
    if left:
        call("docker", "rm", "--force", *left)


def finetune(**more: object) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("base"), "save": Path("it's $(an) adapter"), "mock_data": True, **more})


def follow(job: RunningJob) -> str:
    out = io.StringIO()
    JobFollower(job, out=out, say=[].append).follow()
    return out.getvalue()


def test_a_job_runs_with_its_config_and_data_and_is_fetched(options: JobOptions, tmp_path: Path) -> None:
    data = tmp_path / "my 'data'.jsonl"
    data.write_text('{"instruction": "hello"}\n')
    job = start("finetune", finetune(mock_data=False, data_path=(str(data),), train_iters=3), options)
    output = follow(job)
    assert f"finetune as {os.getuid()}:{os.getgid()} in /checkpoints" in output
    assert 'data {"instruction": "hello"}' in output
    assert [line for line in output.splitlines() if line.startswith("iteration")] == [
        f"iteration {n}" for n in range(3)
    ]
    (row,) = find_job(job.name)
    assert (row.state, row.exit_code, row.verb) == ("exited", 0, "finetune")
    (place,) = fetch_job(job.name, tmp_path)
    assert place == tmp_path / "it's $(an) adapter"
    assert (place / "saved.txt").read_text() == "done"
    with pytest.raises(ConfigError, match="already"):
        fetch_job(job.name, tmp_path)


def test_stop_waits_for_the_save(options: JobOptions) -> None:
    job = start("finetune", finetune(train_iters=1000), options)
    # Somebody else's job is refused by the host itself, also if it was not seen before.
    (host,), argv = job.hosts, ("docker", "run", "--detach", "--rm", options.image, "true")
    spec = make_spec("finetune-2", "finetune", finetune(save=Path("b")), options, 1)
    second = Ssh().run(host, start_argv(argv, spec, HostFacts()))
    assert (second.exit_code, second.errors.strip()) == (BUSY, f"finetune {job.name}")
    with pytest.raises(BusyError, match=f"{job.name} is running"):
        start("finetune", finetune(save=Path("b")), options)
    began = time.monotonic()
    (row,) = stop(find_job(job.name))
    assert row.exit_code == 0
    assert time.monotonic() - began < 20
    saved = Path(options.checkpoints_folder) / "it's $(an) adapter/saved.txt"
    assert saved.read_text() == "stopped"


def test_a_failure_is_reported_with_its_class_cause_and_command(options: JobOptions) -> None:
    job = start("finetune", finetune(seed=666), options)
    with pytest.raises(TrainingError) as caught:
        follow(job)
    assert "A GPU's memory is full" in str(caught.value)
    assert "exit code 6" in str(caught.value)


def test_leaving_by_ctrl_c_twice_lets_the_job_go_on(options: JobOptions) -> None:
    job = start("finetune", finetune(train_iters=80), options)
    said: list[str] = []
    before = signal.getsignal(signal.SIGALRM)
    # The alarm interrupts this thread twice, as Ctrl-C would. It is disabled at the end of the test.
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 1.5, 1.0)
    try:
        with pytest.raises(Left):
            JobFollower(job, out=io.StringIO(), say=said.append).follow()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "Ctrl-C again leaves it running" in said[0]
    assert "continues" in said[1]
    (row,) = find_job(job.name)
    assert row.running
    output = follow(job)
    assert "iteration 79" in output
    assert output.count("iteration 5\n") == 1


def test_a_lost_connection_is_taken_up_again_without_a_line_twice(options: JobOptions) -> None:
    job = start("finetune", finetune(train_iters=60), options)

    def cut() -> None:
        time.sleep(2)
        for child in psutil.Process().children():
            if child.name() == "ssh" and "logs --follow" in " ".join(child.cmdline()):
                child.kill()

    threading.Thread(target=cut, daemon=True).start()
    lines = [line for line in follow(job).splitlines() if line.startswith("iteration")]
    assert lines == [f"iteration {number}" for number in range(60)]


def test_jobs_are_found_from_any_machine_and_logs_shown(
    options: JobOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = start("convert", ConvertConfig(hf_model_path="a/b", output_path=Path("x")), options)
    follow(job)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another laptop"))
    rows, errors = list_jobs(job.hosts)
    assert [row.job for row in rows] == [job.name]
    assert not errors
    out = io.StringIO()
    show_logs(find_job(job.name[:-2], job.hosts), out=out)
    assert "convert as" in out.getvalue()
    with pytest.raises(ConfigError, match="No job"):
        find_job("nothing-like-it", job.hosts)


def test_what_a_host_lacks_is_reported_before_anything_starts(options: JobOptions, light_hosts: HostMaker) -> None:
    import dataclasses

    with pytest.raises(HostError, match="--tags image"):
        start("finetune", finetune(), dataclasses.replace(options, image="mixtral-run:not-there"))
    with pytest.raises(HostError, match="--tags hf_cache"):
        start("finetune", finetune(), dataclasses.replace(options, checkpoints_folder="/not/there"))


def test_the_token_reaches_a_job_by_file_and_is_seen_nowhere(
    options: JobOptions, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_0123456789abcdefghij"
    (Path(options.hf_home) / "token").write_text(token)
    # As on many laptops, the token is in the environment and in the file that huggingface_hub writes.
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, token)
    (home / ".cache/huggingface").mkdir(parents=True)
    (home / ".cache/huggingface/token").write_text(token)
    with seen_arguments() as seen:
        job = start("finetune", finetune(train_iters=10), options)
        output = follow(job)
    assert f"token of {len(token)} characters" in output
    inspected = engine(Ssh(), job.hosts[0], "inspect", job.name).output
    # Check that the data searched below would show it: the container's record, and every program run for the job.
    assert "PYTHONUNBUFFERED=1" in inspected
    for program in ("docker run", "ssh -o", "mixtral-run finetune --config"):
        assert any(program in words and (job.name in words or "--config" in words) for words in seen), program
    logs = call("docker", "logs", job.name)
    assert "iteration 9" in logs
    files = [file for place in ("state", ".local") for file in (home / place).rglob("*") if file.is_file()]
    files += [file for file in (tmp_path / "hosts").rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"hosts.json", "config.json", "sshd.log"} <= names
    kept = [file.read_text(errors="replace") for file in files]
    assert not [words for words in (inspected, logs, output, *seen, *kept) if token in words]


def test_fetching_what_is_not_there_leaves_nothing(options: JobOptions, tmp_path: Path) -> None:
    job = start("finetune", finetune(train_iters=0 + 1), options)
    follow(job)
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(HostError):
        fetch(job.hosts[0], "/no/such/file", target / "file")
    assert list(target.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux engine")
def test_the_command_line_starts_a_job(options: JobOptions) -> None:
    argv = [
        sys.executable, "-m", "mixtral_run", "finetune", "--on", options.on[0], "--image", options.image,
        "--shm-size", "64m", "--ulimit", "none", "--hf-home", options.hf_home,
        "--checkpoints-folder", options.checkpoints_folder,
        "--load", "base", "--save", "adapter", "--mock_data", "--train_iters", "2",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "iteration 1" in done.stdout
    assert "mixtral-run fetch finetune-" in done.stderr
