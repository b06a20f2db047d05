"""A tiny Mixtral in the released layout and its converted checkpoint, made once a session."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.terminal.report import Report
from mixtral_run.trial.random_mixtral import write_random_mixtral
from mixtral_run.trial.sizes import tokenizer_texts
from tests.support.needs import missing
from tests.support.processes import warm
from tests.support.servers.s3_server import BUCKET, s3_server

SMALL = MixtralArchitecture(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=16,
    num_experts=8,
    moe_router_topk=2,
    vocab_size=512,
    max_position_embeddings=256,
    rotary_base=1e6,
    layernorm_epsilon=1e-5,
)


@pytest.fixture(scope="session")
def small_hf_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    write_random_mixtral(
        folder,
        architecture=SMALL,
        dtype="float32",
        seed=7,
        texts=tokenizer_texts(),
        num_shards=2,
        initializer_range=0.1,
    )
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(small_hf_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Converted for TP2/EP4: every other layout reshards it at load."""
    from mixtral_run.weights.convert.to_megatron import convert

    folder = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(ConvertConfig(hf_model_path=str(small_hf_model), output_path=folder), Report.silent())
    return folder


@pytest.fixture
def own_checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    shutil.copytree(small_checkpoint, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def own_hf_model(small_hf_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may write into."""
    shutil.copytree(small_hf_model, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The client of a server with one bucket, whose address and keys are in the environment."""
    import boto3

    with s3_server() as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3", region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)
        yield client


def environment_of(**changes: str) -> dict[str, str]:
    """One thread a process: the tests' models are too small for more."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def torchrun(num_processes: int, script: Path, *words: str) -> str:
    """Run a script in several processes. Return what they printed, which is shown when one of them fails."""
    environment = environment_of()
    if warm.can_fork(environment):
        codes, output = warm.run_ranks(num_processes, [str(script), *words], environment)
        assert not any(codes), f"exit codes {codes}\n{output[-12000:]}"
        return output
    argv = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", str(script), *words]
    done = warm.run(argv, environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    return done.stdout


def mixtral_run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it, in a process that need not import torch."""
    return warm.run(["-m", "mixtral_run", *words], environment_of(**environment))


def fresh_mixtral_run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line as a user calls it, by a new interpreter: each verb does all of its own imports somewhere."""
    argv = [sys.executable, "-m", "mixtral_run", *words]
    return subprocess.run(argv, capture_output=True, text=True, env=environment_of(**environment), check=False)


@pytest.fixture
def mounted(tmp_path: Path) -> object:
    """A small disk of its own at tmp_path/disk, where this user may mount one."""
    point = tmp_path / "disk"
    point.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(point)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        missing("mounting needs root")
    yield point
    subprocess.run(["umount", str(point)], check=True)
