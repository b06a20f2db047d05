"""The verbs as a user calls them: what they print, what they leave, how they refuse, how they stop."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mixtral_run.config.verbs.plan import PlanConfig
from mixtral_run.planner.table import planned_gpu, workload_of
from mixtral_run.weights.manifest.describe import describe_base
from tests.multiprocess.conftest import environment_of, fresh_mixtral_run, mixtral_run
from tests.support.processes import commands

TWO = ("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "2", "--nproc-per-node", "2")
TINY_RUN = ("--seq-length", "32", "--global-batch-size", "4", "--device", "cpu")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    lines = [{"instruction": f"Say {word}.", "response": word} for word in ("one", "two", "three", "four")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="session")
def adapter(small_checkpoint: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the guide's own command, under the user's torchrun, with the guide's underscores."""
    folder = tmp_path_factory.mktemp("finetune") / "adapter"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "mixtral_run",
            "finetune",
            "--load",
            str(small_checkpoint),
            "--data_path",
            str(pairs),
            "--save",
            str(folder),
            "--tensor_model_parallel_size",
            "2",
            "--expert_model_parallel_size",
            "2",
            "--seq_length",
            "32",
            "--micro_batch_size",
            "1",
            "--global_batch_size",
            "4",
            "--train_iters",
            "4",
            "--save_interval",
            "2",
            "--lora_rank",
            "4",
            "--lora_alpha",
            "8",
            "--lr",
            "1e-3",
            "--min_lr",
            "1e-4",
            "--device",
            "cpu",
            "--recompute_activations",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_finetune_prints_what_people_know(adapter: Path) -> None:
    out = (adapter / "stdout.txt").read_text()
    assert "4 examples" in out and "4 iterations of 4 are 4.0 epochs" in out
    assert "target modules: linear_qkv, linear_proj, linear_fc1, linear_fc2 (one adapter per expert)" in out
    assert re.search(r"trainable parameters: [\d,]+ of [\d,]+ \(\d+\.\d+%\)", out)
    assert out.count("Gradients are summed") == 1
    assert "Gradients are summed after the backward pass: the pass has collectives of its own under TP2/EP2\n" in out
    line = next(line for line in out.splitlines() if line.startswith("iteration 4/4 | "))
    for part in ("lm loss: ", "tokens/s: ", "TFLOP/s/process: ", "peak GB: ", "ETA: ", "learning rate: 1.000E-04"):
        assert part in line
    assert "✓ LoRA fine-tuning complete:" in out
    assert out.count("iteration 4/4") == 1, "one process speaks"


def test_the_proof_of_an_adapter_is_its_checksums(adapter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "copy"))
    done = mixtral_run("verify", "--load", str(folder), "--proof")
    assert done.returncode == 0 and "by the checksums in the manifest" in done.stdout, done.stderr
    file = next(folder.glob("iter_0000004/*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    done = mixtral_run("verify", "--load", str(folder), "--proof")
    assert done.returncode == 4 and file.name in done.stderr


def test_finetune_leaves_whole_checkpoints(adapter: Path) -> None:
    assert (adapter / "latest_checkpointed_iteration.txt").read_text().strip() == "4"
    assert sorted(path.name for path in adapter.glob("*iter_*")) == ["iter_0000002", "iter_0000004"]
    losses = [json.loads(line)["loss"] for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert list((adapter / "tensorboard").iterdir())


def test_finetune_sums_its_run_up(adapter: Path) -> None:
    lines = [json.loads(line) for line in (adapter / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((adapter / "summary.json").read_text())
    # The first iteration pays for warming up.
    middle = statistics.median(line["seconds"] for line in lines[1:])
    assert summary["iterations"] == 4 and summary["seconds_per_iteration"] == middle
    assert summary["tokens_per_second"] == pytest.approx(lines[0]["tokens_per_second"] * lines[0]["seconds"] / middle)
    assert summary["tokens_per_second"] == pytest.approx(2 * summary["tokens_per_second_per_process"])
    assert summary["tflops_per_process"] > 0
    assert summary["seconds"] > sum(line["seconds"] for line in lines)
    assert summary["load_seconds"] > 0
    assert len(summary["peak_memory_gib"]) == summary["num_processes"] == 2
    assert all(0.1 < peak < 10 for peak in summary["peak_memory_gib"])
    assert (summary["device"], summary["recompute"], summary["base_precision"]) == ("cpu", "full", "fp32")
    shown = f"{summary['tokens_per_second_per_process']:,.0f} tokens/s/process"
    assert shown in (adapter / "stdout.txt").read_text()


def test_verify_describes_an_adapter(adapter: Path) -> None:
    done = mixtral_run("verify", "--load", str(adapter))
    assert done.returncode == 0, done.stderr
    assert "adapter" in done.stdout


def test_generate_with_an_adapter_as_json(small_checkpoint: Path, adapter: Path) -> None:
    done = mixtral_run(
        "generate",
        "--load",
        str(small_checkpoint),
        "--adapter",
        str(adapter),
        *TWO,
        "--device",
        "cpu",
        "--instruction",
        "Say one.",
        "--prompt",
        "Once",
        "--max-new-tokens",
        "3",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [answer["prompt"] for answer in answers] == ["Once", "Say one."]
    assert all(1 <= answer["num_tokens"] <= 3 for answer in answers)


def test_an_earlier_iteration_is_taken_by_its_folder(small_checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    words = ("generate", "--load", str(small_checkpoint), *TWO, "--device", "cpu", "--max-new-tokens", "3")
    earlier = adapter / "iter_0000002"
    done = mixtral_run(*words, "--adapter", str(earlier), "--prompt", "Once", "--json")
    assert done.returncode == 0, done.stderr
    assert f"with {earlier}" in done.stderr
    for verb in (("verify", "--load", str(earlier)), ("export", "--adapter", str(earlier), "--output-path")):
        done = mixtral_run(*verb, *([str(tmp_path / "exported")] if verb[0] == "export" else []))
        assert done.returncode == 0 and re.search(r"iteration\W+2\b", done.stdout), done.stdout + done.stderr
    # What is cut off has no record, which is written last.
    broken = tmp_path / "iter_0000002"
    shutil.copytree(earlier, broken, ignore=shutil.ignore_patterns("mixtral_run.json"))
    done = mixtral_run(*words, "--adapter", str(broken), "--prompt", "Once")
    assert done.returncode == 5 and "does not say what it is" in done.stderr


def test_smoke(small_hf_model: Path, tmp_path: Path) -> None:
    words = (
        "smoke",
        "--hf-model-path",
        str(small_hf_model),
        "--load",
        str(tmp_path / "c"),
        "--work-path",
        str(tmp_path / "w"),
        "--nproc-per-node",
        "2",
        *TINY_RUN,
        "--train-iters",
        "2",
        "--json",
    )
    done = fresh_mixtral_run(*words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [step["name"] for step in report["steps"]] == ["convert", "pretrain 2", "LoRA 2", "generate"]
    assert all(step["seconds"] > 0 and step["peak_memory_gib"] > 0 for step in report["steps"])
    assert done.stderr.count("Layout: TP1/EP2 for 2 processes, chosen by the planner") == 3
    # A checkpoint that a step cannot use: the table says so, the exit code is a failed check's.
    for chunk in (tmp_path / "c" / "iter_0000001").glob("*.distcp"):
        chunk.unlink()
    again = mixtral_run(*words)
    assert again.returncode == 4
    steps = json.loads(again.stdout)["steps"]
    assert steps[0]["result"].startswith("already done")
    assert not steps[-1]["passed"]
    assert "Traceback" not in again.stderr


def test_everything_wrong_with_a_run_is_reported_at_once(small_checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        '{"instruction": "a", "response": "b"}\n{"instruction": "a"}\nnot json\n{"instruction": "a", "response": " "}\n'
    )
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    other = tmp_path / "other.jsonl"
    other.write_text('{"instruction": "a"}\n')
    done = mixtral_run(
        "finetune",
        "--load",
        str(small_checkpoint),
        "--data-path",
        str(broken),
        "--valid-data-path",
        str(other),
        "--save",
        str(full),
        "--tensor-model-parallel-size",
        "8",
        "--expert-model-parallel-size",
        "8",
        "--nproc-per-node",
        "16",
        "--seq-length",
        "32",
        "--global-batch-size",
        "3",
        "--train-iters",
        "1000000000",
        "--save-interval",
        "1",
    )
    assert done.returncode == 2
    for part in (
        "query groups",
        "--global-batch-size",
        "line 2: the keys fit no shape: 'instruction'; instruction needs 'response'",
        "line 3: broken JSON",
        "line 4: 'response' is empty",
        "Some validation data cannot be used.",
        f"--valid-data-path {other}",
        "expected a new or empty folder",
        "no space on the disk",
    ):
        assert part in done.stderr, done.stderr
    assert [path.name for path in full.iterdir()] == ["mine.txt"]


def test_a_layout_that_does_not_fit_the_processes(small_checkpoint: Path, tmp_path: Path) -> None:
    done = mixtral_run(
        "finetune",
        "--load",
        str(small_checkpoint),
        "--mock-data",
        "--save",
        str(tmp_path / "s"),
        "--nproc-per-node",
        "2",
        "--expert-tensor-parallel-size",
        "2",
    )
    assert done.returncode == 2
    assert "--expert-tensor-parallel-size: expected 1" in done.stderr
    done = mixtral_run(
        "finetune",
        "--load",
        str(small_checkpoint),
        "--mock-data",
        "--save",
        str(tmp_path / "s"),
        *("--tensor-model-parallel-size", "2", "--expert-model-parallel-size", "4"),
        "--nproc-per-node",
        "2",
    )
    assert done.returncode == 2
    assert "TP2/EP4 does not fit 2 processes" in done.stderr
    assert "--nproc-per-node 4" in done.stderr
    assert not (tmp_path / "s").exists()


def test_a_pair_without_room_for_its_response_stops_the_run_once(small_checkpoint: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"instruction": "word " * 200, "response": "b"}) + "\n")
    done = mixtral_run(
        "finetune",
        "--load",
        str(small_checkpoint),
        "--data-path",
        str(long),
        "--valid-data-path",
        str(long),
        "--save",
        str(tmp_path / "s"),
        *TWO,
        *TINY_RUN,
    )
    assert done.returncode == 2
    # Both processes found it; it is reported once for each file, and no adapter is left.
    assert done.stderr.count("line 1") == 2
    assert f"--data-path {long}" in done.stderr and f"--valid-data-path {long}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "s" / "latest_checkpointed_iteration.txt").exists()


def test_an_adapter_of_another_base_is_refused(adapter: Path, small_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in small_checkpoint.iterdir():
        if path.name != "mixtral_run.json":
            (other / path.name).symlink_to(path)
    record = json.loads((small_checkpoint / "mixtral_run.json").read_text())
    (other / "mixtral_run.json").write_text(json.dumps({**record, "fingerprint": "0" * 64}))
    done = mixtral_run("generate", "--load", str(other), "--adapter", str(adapter), "--prompt", "x", *TWO)
    assert done.returncode == 5
    assert "The adapter was trained on another base." in done.stderr


def test_ctrl_c_saves_and_resume_goes_on(small_checkpoint: Path, pairs: Path, tmp_path: Path) -> None:
    save = tmp_path / "adapter"
    words = (
        "finetune",
        "--load",
        str(small_checkpoint),
        "--data-path",
        str(pairs),
        "--save",
        str(save),
        *TWO,
        *TINY_RUN,
    )
    command = ["-m", "mixtral_run", *words, "--train-iters", "100000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with commands.start(command, environment_of(), **streams) as process:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith("iteration") and "3/100000" in line:
                process.send_signal(signal.SIGINT)
                break
        else:
            pytest.fail(seen)
        started = time.monotonic()
        seen += process.stdout.read()
        process.wait()
    assert time.monotonic() - started < 120
    assert process.returncode == 130, seen
    assert "as requested" in seen
    assert seen.count("a checkpoint is saved. Ctrl-C again ends at once, without it.") == 1
    assert "Traceback" not in seen
    stopped = int((save / "latest_checkpointed_iteration.txt").read_text())
    assert stopped >= 3
    refused = mixtral_run(*words, "--train-iters", str(stopped + 2))
    assert refused.returncode == 2
    assert "--resume" in refused.stderr
    done = mixtral_run(*words, "--train-iters", str(stopped + 2), "--resume")
    assert done.returncode == 0, done.stderr
    assert f"iteration {stopped + 2}/{stopped + 2} |" in done.stdout
    assert f"iteration {stopped}/" not in done.stdout
    assert "Samples may repeat" not in done.stdout + done.stderr
    kept = sorted(file.stat().st_mtime_ns for file in save.rglob("*.distcp"))
    over = mixtral_run(*words, "--train-iters", str(stopped + 2), "--resume", "--lora-rank", "3")
    assert over.returncode == 2 and "--lora-rank: the checkpoint has" in over.stderr
    over = mixtral_run(*words, "--train-iters", str(stopped + 2), "--resume")
    assert over.returncode == 0 and "The run is complete" in over.stdout
    assert sorted(file.stat().st_mtime_ns for file in save.rglob("*.distcp")) == kept
    other = mixtral_run(*words, "--train-iters", str(stopped + 3), "--resume", "--pack")
    assert other.returncode == 0, other.stderr
    assert "because the data or its order changed: --pack True (was False)" in " ".join(
        (other.stdout + other.stderr).split()
    )


def test_the_plan_counts_a_checkpoint_as_it_will_be_loaded(small_checkpoint: Path) -> None:
    assert describe_base(small_checkpoint).dtype == "float32"
    gpu = planned_gpu(PlanConfig())
    workload = workload_of(PlanConfig(load=small_checkpoint), gpu)
    assert (workload.weight_bytes, workload.expert_bytes) == (4, 4)
    assert workload_of(PlanConfig(load=small_checkpoint, base_precision="fp8"), gpu).expert_bytes == 1
