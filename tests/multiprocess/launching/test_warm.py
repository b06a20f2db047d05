"""A forked command is what a new interpreter makes of the same words (tests/support/processes/warm.py)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.multiprocess.conftest import environment_of, fresh_mixtral_run, mixtral_run
from tests.support.needs import missing
from tests.support.processes import warm

STATE = """
import json, os, random, signal, sys, threading, warnings
import numpy, torch
print(json.dumps({
    "argv": sys.argv, "path": sys.path[0], "main": __name__, "cwd": os.getcwd(), "environment": dict(os.environ),
    "threads": threading.active_count(), "torch threads": torch.get_num_threads(),
    "silent": ("ignore", None, Warning, None, 0) in warnings.filters, "seeds": [torch.initial_seed(), random.random()],
    "numpy": float(numpy.random.rand()), "stdin": sys.stdin.read(), "grad": torch.is_grad_enabled(),
    "dtype": str(torch.get_default_dtype()), "descriptors": sorted(os.listdir("/proc/self/fd"))[:-1],
    "signals": [str(signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)],
    "streams": [(each.encoding, each.errors, each.line_buffering, each.isatty()) for each in (sys.stdout, sys.stderr)],
}))
print("to stderr", file=sys.stderr)
sys.exit(7)
"""


def fresh(argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = warm.run(argv, {**environment, warm.FRESH_VARIABLE: "1"})
    assert done.args[0] == sys.executable
    return done


def forked(argv: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if not warm.can_fork(environment):
        missing("no fork server here: a GPU, or a system without pidfd")
    done = warm.run(argv, environment)
    assert done.args == argv
    return done


def test_the_server_ends_with_its_owner_only() -> None:
    server = warm.WarmServer(())
    # A client that goes away without a request changes nothing.
    server.connect().close()
    child = os.fork()
    if child == 0:
        server.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    server.connect().close()
    server.close()
    with pytest.raises(RuntimeError, match="did not start"):
        server.connect()


def test_it_starts_in_the_same_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "state.py"
    script.write_text(STATE)
    for argv in (["-c", STATE, "a", "-b"], [str(script), "a"]):
        states = []
        for start in (fresh, forked):
            done = start(argv, environment_of())
            assert (done.returncode, done.stderr) == (7, "to stderr\n")
            state = json.loads(done.stdout)
            state["environment"].pop(warm.FRESH_VARIABLE, None)
            states.append(state)
        seeds = [(*state.pop("seeds"), state.pop("numpy")) for state in states]
        assert states[0] == states[1]
        # Every process draws other numbers, forks as well.
        seeds.append((*(again := json.loads(forked(argv, environment_of()).stdout))["seeds"], again["numpy"]))
        assert all(len(set(each)) == len(seeds) for each in zip(*seeds, strict=True))


def test_a_module_is_main_and_what_it_starts_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's fork server, which the product's launcher uses, serves the command and ends with it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pool.py").write_text(
        "import multiprocessing, os, sys\n"
        "def work(number):\n"
        "    return number, __name__, os.environ['ADDED'], sys.argv\n"
        "if __name__ == '__main__':\n"
        "    os.environ['ADDED'] = 'yes'\n"
        "    print('once')\n"
        "    with multiprocessing.get_context('forkserver').Pool(2) as pool:\n"
        "        print(pool.map(work, range(3)))\n"
    )
    argv = ["-m", "pool", "word"]
    ends = [start(argv, environment_of()) for start in (fresh, forked)]
    assert [(end.returncode, end.stderr) for end in ends] == [(0, "")] * 2
    assert ends[0].stdout == ends[1].stdout
    assert ends[0].stdout.startswith("once\n[(0, '__mp_main__', 'yes',")


def test_how_it_ends_is_reported() -> None:
    killed = forked(["-c", "import os; os.kill(os.getpid(), 9)"], environment_of())
    assert killed.returncode == -signal.SIGKILL
    raised = forked(["-c", "import atexit; atexit.register(print, 'at exit'); raise ValueError(3)"], environment_of())
    assert (raised.returncode, raised.stdout) == (1, "at exit\n")
    assert raised.stderr.endswith("ValueError: 3\n")


def test_verbs_say_the_same(small_checkpoint: Path) -> None:
    for words in (["verify", "--load", str(small_checkpoint)], ["finetune", "--lora-rank", "0"], ["convrt"]):
        new, from_server = fresh_mixtral_run(*words), mixtral_run(*words)
        assert (new.returncode, new.stdout, new.stderr) == (
            from_server.returncode,
            from_server.stdout,
            from_server.stderr,
        )


def test_another_environment_gets_a_new_interpreter() -> None:
    assert warm.can_fork(environment_of(PYTEST_CURRENT_TEST="x")) or torch.cuda.is_available()
    assert not warm.can_fork(environment_of(PYTHONPATH="elsewhere"))
    assert not warm.can_fork({name: value for name, value in environment_of().items() if name != "PATH"})


def test_hf_variables_are_read_by_each_command() -> None:
    code = "from huggingface_hub import constants; print(constants.ENDPOINT)"
    for number in range(2):
        done = forked(["-c", code], environment_of(HF_ENDPOINT=f"http://127.0.0.1:{number}"))
        assert (done.returncode, done.stdout) == (0, f"http://127.0.0.1:{number}\n"), done.stderr


def test_the_first_rank_that_fails_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time\n"
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "everyone = [None] * dist.get_world_size()\n"
        "dist.all_gather_object(everyone, os.environ['LOCAL_RANK'])\n"
        "assert everyone == ['0', '1'], everyone\n"
        "if sys.argv[1] == 'fails':\n"
        "    time.sleep(600 * (dist.get_rank() == 0))\n"
        "    raise ValueError('rank 1 it was')\n"
        "dist.destroy_process_group()\n"
    )
    if not warm.can_fork(environment_of()):
        missing("no fork server here: a GPU, or a system without pidfd")
    assert warm.run_ranks(2, [str(script), "passes"], environment_of()) == ([0, 0], "")
    codes, output = warm.run_ranks(2, [str(script), "fails"], environment_of())
    assert codes == [-signal.SIGKILL, 1] and "ValueError: rank 1 it was" in output
