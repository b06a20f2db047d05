"""SIGTERM to a job, in the words that its containers run: it saves, ends as stopped, and goes on with --resume."""

import json
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import JobOptions, container_argv, make_spec
from mixtral_run.fleet.jobs.jobs import SIGNALLED
from tests.multiprocess.conftest import environment_of, mixtral_run
from tests.support.processes import commands

PATIENCE_SECONDS = 300


def start(config: FinetuneConfig, folder: Path, num_hosts: int) -> list[subprocess.Popen[str]]:
    """The programs of the hosts' containers; STAND-IN for two machines: both are this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    spec = make_spec("stop", "finetune", config, JobOptions(), num_hosts, meeting)
    argv = container_argv(spec, HostFacts(address="127.0.0.1"))
    program = argv[argv.index(spec.options.image) + 1 :]
    python = ["-m", "mixtral_run"] if program[0] == "mixtral-run" else []
    words = [*python, *program[1:]]
    words[words.index("/job/config.json")] = str(folder / "config.json")
    (folder / "config.json").write_text(spec.config_json())
    environment = environment_of(GLOO_SOCKET_IFNAME="lo")
    return [
        commands.start(words, environment, stdout=(folder / f"{name}.log").open("wb"), stderr=subprocess.STDOUT)
        for name in ("gpu-01", "gpu-02")[:num_hosts]
    ]


def printed(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(folder.glob("*.log")))


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_job_saves_when_it_is_stopped_and_goes_on(small_checkpoint: Path, tmp_path: Path, num_hosts: int) -> None:
    config = FinetuneConfig(
        load=small_checkpoint, save=tmp_path / "adapter", mock_data=True, seq_length=32, global_batch_size=4,
        train_iters=100_000, tensor_model_parallel_size=2, expert_model_parallel_size=2, nproc_per_node=2 // num_hosts,
        # A save in the background is pending almost always.
        device="cpu", save_interval=1, keep_last=2,
    )  # fmt: skip
    hosts = start(config, tmp_path, num_hosts)
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while "iteration 2/100000" not in " ".join(printed(tmp_path).split()):
            assert time.monotonic() < until and all(host.poll() is None for host in hosts), printed(tmp_path)
            time.sleep(0.1)
        for host in hosts:
            host.send_signal(signal.SIGTERM)
        codes = [host.wait(PATIENCE_SECONDS) for host in hosts]
    finally:
        for host in hosts:
            if host.poll() is None:
                for process in [*psutil.Process(host.pid).children(recursive=True), host]:
                    process.kill()
    output = printed(tmp_path)
    assert set(codes) <= {0, *SIGNALLED}, output
    assert "as requested" in output
    assert "Traceback" not in output
    stopped = int((config.save / "latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 2
    assert not list(config.save.glob(".iter_*")) and len(list(config.save.glob("iter_*"))) == 2
    assert f"Stopped on request at iteration {stopped} of 100000" in (config.save / "report.html").read_text()
    assert json.loads((config.save / "summary.json").read_text())["last_iteration"] == stopped
    routed = [json.loads(line) for line in (config.save / "router.jsonl").read_text().splitlines()]
    assert sum(line["iterations"] for line in routed) == stopped
    more = ("--train-iters", str(stopped + 1), "--nproc-per-node", "2", "--resume")
    done = mixtral_run("finetune", "--config", str(tmp_path / "config.json"), *more)
    assert done.returncode == 0, done.stderr
    assert f"iteration {stopped + 1}/{stopped + 1} |" in done.stdout
    assert f"iteration {stopped}/" not in done.stdout
