"""The batch script of --launcher slurm: its lines, its quoting, and what it does with each end of a job."""

from __future__ import annotations

import os
import re
import stat
import subprocess
from pathlib import Path

import pytest

from mixtral_run.config.launchers.slurm import SlurmConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig, VerifyConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.jobs.job_spec import JobOptions
from mixtral_run.fleet.launchers.launcher import LaunchRequest
from mixtral_run.fleet.launchers.slurm.commands import parse_job
from mixtral_run.fleet.launchers.slurm.launcher import SlurmLauncher
from mixtral_run.fleet.launchers.slurm.script import spec_of

HOSTILE = """a b'; touch pwned; "$(touch pwned)" `touch pwned` \\ $HOME"""


def request(settings: SlurmConfig | None = None, options: JobOptions | None = None, **config: object) -> LaunchRequest:
    values = {"load": Path("mixtral"), "save": Path("out"), "mock_data": True, "nproc_per_node": 1, **config}
    return LaunchRequest(
        name="finetune-1", verb="finetune", config=FinetuneConfig(**values), options=options or JobOptions(),
        settings=settings or SlurmConfig(nodes=2),
    )  # fmt: skip


def script(*words: object, **config: object) -> str:
    return SlurmLauncher().render(request(*words, **config))  # type: ignore[arg-type]


def directives(text: str) -> list[str]:
    return re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)


def test_the_directives() -> None:
    own = SlurmConfig(
        nodes=2, gpus_per_node=4, partition="gpu", account="lab", qos="long", constraint="[a|b]&c", time="1-00:00:00",
        save_seconds=200, cpus_per_task=32, slurm_option=("mem=400G", "no-kill", "requeue-delay=3"),
    )  # fmt: skip
    assert directives(script(own.check())) == [
        "job-name=finetune-1", "nodes=2", "ntasks-per-node=1", "gpus-per-node=4", "cpus-per-task=32", "partition=gpu",
        "account=lab", "qos=long", "constraint=[a|b]&c", "time=1-00:00:00", "output=log.txt", "open-mode=append",
        "requeue", "signal=B:USR1@200", "mem=400G", "no-kill", "requeue-delay=3",
    ]  # fmt: skip
    whole = directives(script(SlurmConfig(gpus_per_node=0, slurm_option=("mem=9G",))))
    assert "exclusive" in whole and "mem=9G" in whole and "mem=0" not in whole
    assert not any(each.startswith("gpus") for each in whole)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"partition": "a b"}, "--partition: expected a value without blanks"),
        ({"account": "x\n#SBATCH --uid=0"}, "--account: expected"),
        ({"constraint": "a'b"}, "--constraint: expected"),
        ({"slurm_option": ("mem=1 G",)}, "--slurm-option: expected KEY=VALUE"),
        ({"slurm_option": ("--mem=1",)}, "--slurm-option: expected KEY=VALUE"),
        ({"slurm_option": ("wrap=x",)}, "cannot work with it"),
        ({"slurm_option": ("partition=x",)}, "expected --partition"),
        ({"time": "forever"}, "--time: expected MINUTES"),
        ({"time": "5", "save_seconds": 330}, "--save-seconds: expected fewer than the 300 of --time; found 330"),
        ({"jobs_folder": "jobs"}, "--jobs-folder: expected an absolute path"),
        ({"python": "/x"}, "--python: expected --container-runtime none; found docker"),
        ({"container_runtime": "podman"}, "--container-runtime: expected one of docker"),
    ],
)
def test_settings_that_would_break_the_script_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SlurmConfig(**settings).check()  # type: ignore[arg-type]
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 5400), ("90:30", 5430), ("2:00:00", 7200), ("1-12", 129600), ("1-00:30:05", 88205)]
)
def test_time_limits_are_read_as_slurm_reads_them(text: str, seconds: int) -> None:
    assert SlurmConfig(time=text).time_seconds == seconds


@pytest.mark.parametrize("runtime", ["docker", "enroot", "apptainer", "none"])
def test_no_value_of_the_users_reaches_the_shell_unquoted(runtime: str, tmp_path: Path) -> None:
    """STAND-IN for Slurm, docker and apptainer: programs that print their arguments, one a line."""
    folder = f"/srv/{HOSTILE}"
    options = JobOptions(
        checkpoints_folder=folder,
        environment=(f"MINE={HOSTILE}",),
        image="x:1" if runtime != "none" else JobOptions.image,
    )
    python = f"{tmp_path}/bin/{HOSTILE}" if runtime == "none" else "python"
    own = SlurmConfig(nodes=1, container_runtime=runtime, python=python)
    save = Path(f"/data/{HOSTILE}/out")
    text = script(own, options, save=save)
    done, output = run_script(text, tmp_path, code=0)
    assert done == 0, output
    assert f"environment {HOSTILE}\n" in output
    assert not list(tmp_path.rglob("pwned"))
    if runtime == "docker":
        # --mount takes fields of CSV, in which a quote is doubled.
        source = folder.replace('"', '""')
        assert f'"source={source}",target=/checkpoints' in output
    elif runtime == "none":
        # The program of that name ran.
        assert "argument mixtral_run.launch.torchrun\n" in output
        assert spec_of(request(own, options, save=save), own).config["load"] == f"{folder}/mixtral"
    else:
        assert f"{folder}:/checkpoints" in output


@pytest.mark.parametrize(("attempt", "limit", "code", "stopped", "requeued"), [
    (0, 3, 0, False, False),
    (0, 3, 1, False, True),
    (2, 3, 137, False, True),
    (0, 3, 143, False, True),
    (0, 3, 6, False, True),
    (3, 3, 6, False, False),
    (0, 0, 6, False, False),
    (0, 3, 143, True, False),
    *((0, 3, code, False, False) for code in (2, 3, 4, 5)),
])  # fmt: skip
def test_a_job_is_queued_again_only_if_repeating_can_help(
    attempt: int, limit: int, code: int, stopped: bool, requeued: bool, tmp_path: Path
) -> None:
    if stopped:
        (tmp_path / "stopped").touch()
    text = script(SlurmConfig(nodes=2), JobOptions(max_restarts=limit))
    end, output = run_script(text, tmp_path, code=code, attempt=attempt)
    assert end == code, output
    assert ("scontrol requeue 7" in output) == requeued, output
    assert (tmp_path / "outcome").read_text() == f"{code}\n"
    assert ("argument --resume\nargument auto\n" in output) == (attempt > 0)


def test_what_was_canceled_is_not_queued_again(tmp_path: Path) -> None:
    end, output = run_script(script(SlurmConfig(nodes=2)), tmp_path, code=143, state="CANCELLED")
    assert end == 143 and "scontrol requeue" not in output and "canceled" in output


def test_the_signal_before_the_limit_goes_to_the_processes_and_not_to_srun(tmp_path: Path) -> None:
    """Facts of Slurm: a signal to srun kills all processes unsaved. STAND-IN: srun waits until scancel is called."""
    end, output = run_script(script(SlurmConfig(nodes=2)), tmp_path, code=143, waits=True)
    assert end == 143, output
    assert "scancel --signal=TERM 7" in output and "asking the job to save" in output
    assert output.index("scancel --signal=TERM 7") < output.index("scontrol requeue 7")


SRUN = """#!/bin/bash
echo "environment $MINE"
if [ -n "$WAITS" ]; then
    kill -USR1 "$PPID"
    until grep -q scancel calls 2>/dev/null; do sleep 0.05; done
fi
while [ "$1" != bash ]; do echo "argument $1"; shift; done
"$@"
exit "$CODE"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>calls
case "$1 $2" in
  "show hostnames") printf 'n1\\nn2\\n' ;;
  "show node") echo "   NodeAddr=10.0.0.${3#n} NodeHostName=x" ;;
  "show job") echo "   JobState=$STATE Reason=None" ;;
esac
"""
ECHO = """#!/bin/bash
for each; do echo "argument $each"; done
"""


def run_script(
    text: str, folder: Path, *, code: int, attempt: int = 0, state: str = "RUNNING", waits: bool = False
) -> tuple[int, str]:
    """Run a script with stand-ins for Slurm's commands and return its exit code and all output."""
    programs = folder / "bin"
    programs.mkdir()
    scancel = '#!/bin/bash\necho "scancel $*" >>calls\n'
    named = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "scancel": scancel,
        "docker": ECHO,
        "apptainer": ECHO,
        "python": ECHO,
        HOSTILE: ECHO,
    }
    for name, content in named.items():
        (programs / name).write_text(content)
        (programs / name).chmod(stat.S_IRWXU)
    environment = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURMD_NODENAME": "n2",
        "SLURM_RESTART_COUNT": str(attempt),
        "CUDA_VISIBLE_DEVICES": "0,1",
        "CODE": str(code),
        "STATE": state,
        "WAITS": "1" if waits else "",
    }
    done = subprocess.run(
        ["bash", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    calls = folder / "calls"
    return done.returncode, done.stdout + done.stderr + (calls.read_text() if calls.exists() else "")


def test_each_node_joins_at_the_address_of_the_first(tmp_path: Path) -> None:
    _, output = run_script(script(SlurmConfig(nodes=2)), tmp_path, code=0, attempt=1)
    words = re.findall(r"argument (.*)", output)
    assert words[words.index("--rdzv-endpoint") + 1] == "10.0.0.1:20007"
    assert words[words.index("--local-addr") + 1] == "10.0.0.2"
    assert words[words.index("--rdzv-id") + 1] == "7-1"
    assert words[words.index("--max-restarts") + 1] == "0"
    assert '"device=0,1"' in words and words[words.index("--name") + 1] == "mixtral-run-7"


def test_containers_get_the_devices_of_the_network_between_nodes_and_the_jobs_own_variables(tmp_path: Path) -> None:
    devices = tmp_path / "infiniband"
    devices.mkdir()
    (devices / "uverbs0").touch(mode=0o660)
    (devices / "uverbs0").chmod(0o660)
    options = JobOptions(environment=("NCCL_IB_HCA=mlx5",))
    two = script(SlurmConfig(nodes=2), options).replace("/dev/infiniband", str(devices))
    _, output = run_script(two, tmp_path, code=0)
    words = re.findall(r"argument (.*)", output)
    assert words[words.index("--device") + 1] == str(devices) and "memlock=-1" in words
    groups = [words[at + 1] for at, word in enumerate(words) if word == "--group-add"]
    assert str((devices / "uverbs0").stat().st_gid) in groups[1:]
    assert "infiniband" not in script(SlurmConfig(nodes=1), options)
    for runtime in ("enroot", "apptainer"):
        own = SlurmConfig(nodes=2, container_runtime=runtime)
        text = script(own, JobOptions(image="a/b:1", environment=("NCCL_IB_HCA=mlx5",)))
        assert "export HF_HOME=/huggingface\n" in text
        if runtime == "enroot":
            (names,) = re.findall(r"--container-env=(\S+)", text)
            assert {"HF_HOME", "NCCL_IB_HCA", "TRITON_CACHE_DIR"} < {*names.split(",")}


def test_options_that_a_runtime_does_not_use_are_refused() -> None:
    for runtime, options, problem in (
        ("none", JobOptions(image="x:1"), "--image: --container-runtime none does not use it"),
        ("enroot", JobOptions(image="x:1", shm_size="1g"), "--shm-size: --container-runtime enroot does not use it"),
        ("apptainer", JobOptions(), "--image: expected FILE.sif"),
        ("enroot", JobOptions(image="x:1", hf_home="/a,b"), "mounts no path with , or :"),
        ("docker", JobOptions(hf_home="/a\nEND_OF_NODE\ntouch x"), "expected text in one line"),
    ):
        with pytest.raises(ConfigError) as caught:
            script(SlurmConfig(container_runtime=runtime), options)
        assert problem in str(caught.value)


def test_a_verb_that_starts_its_own_processes_does_so_on_one_node() -> None:
    def program(nodes: int) -> str:
        settings = SlurmConfig(nodes=nodes)
        config = VerifyConfig(load=Path("mixtral"))
        own = LaunchRequest(name="verify-1", verb="verify", config=config, options=JobOptions(), settings=settings)
        return SlurmLauncher().render(own)

    assert "set -- python -m mixtral_run verify" in program(1) and "torchrun" not in program(1)
    assert "torchrun --nnodes 2" in program(2)
    assert "torchrun --nnodes 1" in script(SlurmConfig(nodes=1))


@pytest.mark.parametrize(
    ("runtime", "image", "shown"),
    [
        ("enroot", "/shared/kit.sqsh", "--container-image=/shared/kit.sqsh "),
        ("enroot", "me/kit:1", "--container-image=me/kit:1 "),
        ("enroot", "reg.example.com:5000/me/kit:1", "--container-image=reg.example.com:5000#me/kit:1 "),
        ("apptainer", "/shared/kit.sif", " /shared/kit.sif "),
        ("apptainer", "me/kit:1", " docker://me/kit:1 "),
        ("docker", "me/kit:1", " me/kit:1 "),
    ],
)
def test_images_are_named_as_each_runtime_names_them(runtime: str, image: str, shown: str) -> None:
    text = script(SlurmConfig(container_runtime=runtime), JobOptions(image=image))
    assert shown in text.replace("'", "")


def test_a_file_of_settings_may_give_the_time_as_a_number() -> None:
    assert SlurmConfig.from_mapping({"time": 120}).check().time == "120"


def test_a_verb_of_one_process_needs_no_torchrun() -> None:
    config = ConvertConfig(hf_model_path="/models/hf", output_path=Path("x"))
    own = LaunchRequest(
        name="convert-1", verb="convert", config=config, options=JobOptions(image="reg.example.com/a/kit:1"),
        settings=SlurmConfig(container_runtime="enroot", gpus_per_node=0),
    )  # fmt: skip
    text = SlurmLauncher().render(own)
    assert "set -- python -m mixtral_run convert --config /job/config.json" in text
    assert "torchrun" not in text and "--resume" not in text
    assert "--container-image=reg.example.com#a/kit:1" in text and "/models:/models" in text


def said(state: str, reason: str, code: str, nodes: str, name: str = "finetune-1") -> str:
    return (
        f"JobId=7 JobName={name} UserId=root(0) JobState={state} Reason={reason} Dependency=(null) Requeue=1 "
        f"Restarts=2 ExitCode={code} NodeList={nodes} Comment=mixtral-run"
    )


@pytest.mark.parametrize(
    ("text", "outcome", "expected"),
    [
        (said("RUNNING", "None", "0:0", "n[1-2]"), "6", ("running", "", None, "n[1-2]", 2)),
        (said("PENDING", "BeginTime", "0:0", "(null)"), "143", ("pending", "BeginTime", None, "", 2)),
        (said("FAILED", "NonZeroExitCode", "5:0", "n1"), "5", ("failed", "NonZeroExitCode", 5, "n1", 2)),
        (said("CANCELLED", "None", "0:15", "n1"), "", ("cancelled", "", 143, "n1", 2)),
        # Slurm has forgotten the job; its script has not.
        ("", "0", ("completed", "", 0, "", 0)),
        ("", "6", ("failed", "", 6, "", 0)),
        ("", "", ("unknown", "", None, "", 0)),
        # The number belongs to another job by now.
        (said("RUNNING", "None", "0:0", "n1", name="other"), "0", ("completed", "", 0, "", 0)),
    ],
)
def test_what_slurm_says_of_a_job(text: str, outcome: str, expected: tuple[object, ...]) -> None:
    line = parse_job(text, "finetune-1", outcome)
    assert (line.state, line.reason, line.exit_code, line.nodes, line.restarts) == expected
    assert line.ended == (line.state not in ("running", "pending"))
