"""The batch script of a job for Slurm. Pure functions; every value of the user's is quoted for the shell."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.fields import Config, field_types, plain_type
from mixtral_run.config.launch import LaunchConfig
from mixtral_run.config.launchers.slurm import NAMED, SlurmConfig
from mixtral_run.config.verbs.training import can_resume
from mixtral_run.errors import INCURABLE, ConfigError
from mixtral_run.fleet.jobs.container_paths import CHECKPOINTS, HF_HOME, JOB_FOLDER, KERNELS
from mixtral_run.fleet.jobs.job_spec import CONFINEMENT, READ_ONLY_ROOT, JobOptions, JobSpec, bind, host_path, make_spec
from mixtral_run.fleet.launchers.launcher import LaunchRequest

MAX_RESTARTS = 3
"""Times that Slurm starts a job again, unless --max-restarts says otherwise."""
UNDER_TORCHRUN = ("finetune", "align", "pretrain", "generate")
"""Verbs that run under torchrun on one node as well. Slurm signals every process of a step; those that the kit itself
would start include a server that is not to be signaled while a run saves."""
LOG, STOPPED, SCRIPT = "log.txt", "stopped", "job.sh"
"""Files of a job's folder: its output, a mark of `stop`, the script. `outcome` is the exit code of the last attempt."""
_DEFAULTS = JobOptions()


def spec_of(request: LaunchRequest, settings: SlurmConfig) -> JobSpec:
    """Return the job with its paths as the job sees them. Raises ConfigError with all problems of its options."""
    _check_options(request, settings)
    spec = make_spec(request.name, request.verb, request.config, request.options, settings.nodes)
    odd = [each for each in spec.mounts if not each.isprintable()]
    if odd:
        raise ConfigError("A path must be text in one line.", problems=[repr(each) for each in odd])
    if settings.container_runtime == "none":
        return dataclasses.replace(spec, config=_on_the_node(request.config, spec.config, request.options), mounts=())
    return spec


def _check_options(request: LaunchRequest, settings: SlurmConfig) -> None:
    runtime, options = settings.container_runtime, request.options
    folders = options.folders()
    problems = [
        f"{flag}: --container-runtime {runtime} does not use it"
        for name, flag, users in (
            ("shm_size", "--shm-size", ("docker",)),
            ("ulimits", "--ulimit", ("docker",)),
            ("image", "--image", ("docker", "enroot", "apptainer")),
        )
        if runtime not in users and getattr(options, name) != getattr(_DEFAULTS, name)
    ]
    if runtime in ("enroot", "apptainer"):
        if options.image == _DEFAULTS.image:
            file = "FILE.sqsh" if runtime == "enroot" else "FILE.sif"
            problems.append(f"--image: expected {file}, or an image of a registry, with {runtime}; found none")
        problems += [f"{each}: {runtime} mounts no path with , or : in it" for each in folders if set(each) & set(",:")]
    texts = (*folders, options.image, settings.python)
    problems += [f"expected text in one line; found {each!r}" for each in texts if not each.isprintable()]
    if problems:
        raise ConfigError("Some settings of the job are wrong.", problems=problems)


def _on_the_node(config: Config, values: Mapping[str, Any], options: JobOptions) -> dict[str, Any]:
    """Return settings with paths of the node in place of those of the container. Files of the job are relative."""
    types = field_types(type(config))

    def place(path: Any) -> Any:
        if isinstance(path, str) and path.startswith(JOB_FOLDER + "/"):
            return path[len(JOB_FOLDER) + 1 :]
        return host_path(path, options.folders()) if isinstance(path, str) else path

    found = dict(values)
    for name, value in values.items():
        if name in DATA_SETTINGS:
            found[name] = [place(each) for each in value]
        elif plain_type(types[name])[0].__name__ == "Path" or name in ("chat_template", "hf_model_path"):
            found[name] = place(value)
    return found


def batch_script(spec: JobSpec, config: Config, settings: SlurmConfig) -> str:
    """Return the script for sbatch. Submit it from the job's folder, which then holds everything else as well."""
    limit = MAX_RESTARTS if spec.options.max_restarts is None else spec.options.max_restarts
    parts = [
        "#!/bin/bash",
        f"# mixtral-run {spec.verb} on {settings.nodes} node{'s' if settings.nodes > 1 else ''} of Slurm.",
        *_directives(spec, settings),
        _SETUP.format(max_restarts=limit),
        *_exports(spec, settings),
        "",
        "# What each node runs.",
        "IFS= read -r -d '' on_node <<'END_OF_NODE'",
        *_node_script(spec, config, settings),
        "END_OF_NODE",
        "",
        _srun(spec, settings),
        _END.format(verb=spec.verb, incurable="|".join(map(str, INCURABLE))),
    ]
    return "\n".join(parts)


def _directives(spec: JobSpec, settings: SlurmConfig) -> list[str]:
    """Return the #SBATCH lines. The names of files are relative to the folder that the script is submitted from."""
    options = [f"job-name={spec.name}", f"nodes={settings.nodes}", "ntasks-per-node=1"]
    if settings.gpus_per_node:
        options.append(f"gpus-per-node={settings.gpus_per_node}")
    if settings.cpus_per_task is None:
        options += ["exclusive", "mem=0"]
    else:
        options.append(f"cpus-per-task={settings.cpus_per_task}")
    options += [f"{name}={value}" for name in NAMED if (value := getattr(settings, name)) is not None]
    options += [f"output={LOG}", "open-mode=append", "requeue", f"signal=B:USR1@{settings.save_seconds}"]
    given = {text.partition("=")[0] for text in settings.slurm_option}
    options = [each for each in options if each.partition("=")[0] not in given]
    return [f"#SBATCH --{each}" for each in (*options, *settings.slurm_option)]


_SETUP = """
set -u
# All files of the job are in the folder that it was submitted from.
job_folder=$SLURM_SUBMIT_DIR
attempt=${{SLURM_RESTART_COUNT:-0}}
max_restarts={max_restarts}
say() {{ echo "mixtral-run: $*"; }}
say "attempt $((attempt + 1)) of at most $((max_restarts + 1)) on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"

# The addresses that Slurm itself uses: the names of nodes need not resolve.
address_of() {{ scontrol show node "$1" | grep -o 'NodeAddr=[^ ]*' | head -n 1 | cut -d= -f2; }}
MIXTRAL_RUN_NODES=
for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do
    MIXTRAL_RUN_NODES+="$node=$(address_of "$node") "
done
head=${{MIXTRAL_RUN_NODES%% *}}
# A new rendezvous for each attempt, so that nothing of the last one is in the way.
MIXTRAL_RUN_RENDEZVOUS=${{head#*=}}:$((20000 + SLURM_JOB_ID % 10000))
MIXTRAL_RUN_RENDEZVOUS_ID=$SLURM_JOB_ID-$attempt
MIXTRAL_RUN_ATTEMPT=$attempt
MIXTRAL_RUN_JOB_FOLDER=$job_folder
export MIXTRAL_RUN_NODES MIXTRAL_RUN_RENDEZVOUS MIXTRAL_RUN_RENDEZVOUS_ID MIXTRAL_RUN_ATTEMPT MIXTRAL_RUN_JOB_FOLDER
"""


def _environment(spec: JobSpec, settings: SlurmConfig) -> dict[str, str]:
    found = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(settings.save_seconds + 60)}
    if settings.container_runtime in ("docker", "apptainer", "enroot"):
        # Some runtimes pass on the variable of the site, which names a folder that the container does not have.
        found |= {"TRITON_CACHE_DIR": KERNELS, "HF_HOME": HF_HOME}
    elif spec.options.hf_home is not None:
        found["HF_HOME"] = spec.options.hf_home
    if spec.options.nccl_debug:
        found["NCCL_DEBUG"] = spec.options.nccl_debug
    return found | dict(pair.split("=", 1) for pair in spec.options.environment)


def _exports(spec: JobSpec, settings: SlurmConfig) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in _environment(spec, settings).items()]


_OWN_ADDRESS = """\
own=
for pair in $MIXTRAL_RUN_NODES; do
    if [ "${pair%%=*}" = "$SLURMD_NODENAME" ]; then own=${pair#*=}; fi
done
# gloo would use the address of the host's name, which is 127.0.1.1 in Debian's /etc/hosts.
interface=$(ip -o -4 addr show 2>/dev/null | awk -v own="$own/" 'index($4, own) == 1 { print $2; exit }')
if [ -n "$interface" ]; then export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}; fi"""


def _node_script(spec: JobSpec, config: Config, settings: SlurmConfig) -> list[str]:
    """Return the lines that bash runs on each node; with enroot it runs them in the container."""
    lines = [_OWN_ADDRESS, *_program(spec, config, settings)]
    runtime = settings.container_runtime
    if runtime in ("docker", "apptainer"):
        lines.append('kernels=$HOME/.cache/mixtral-run/kernels; mkdir -p "$kernels"')
    if runtime == "docker":
        return [*lines, *_docker(spec, settings)]
    if runtime == "apptainer":
        binds = [word for mount in _mounts(spec) for word in ("--bind", mount)]
        gpus = ["--nv"] if settings.gpus_per_node else []
        words = ["exec", "apptainer", "exec", *gpus, "--pwd", CHECKPOINTS, *binds]
        own = f'--bind "$MIXTRAL_RUN_JOB_FOLDER:{JOB_FOLDER}:ro" --bind "$kernels:{KERNELS}"'
        return [*lines, f'{shlex.join(words)} {own} {shlex.quote(_apptainer_image(spec.options.image))} "$@"']
    return [*lines, 'exec "$@"']


def _program(spec: JobSpec, config: Config, settings: SlurmConfig) -> list[str]:
    """Return the lines that set the positional parameters to the program with its arguments."""
    bare = settings.container_runtime == "none"
    python = shlex.quote(settings.python) if bare else "python"
    file = "config.json" if bare else f"{JOB_FOLDER}/config.json"
    verb = f"-m mixtral_run {spec.verb} --config {file}"
    if settings.nodes > 1 or (isinstance(config, LaunchConfig) and spec.verb in UNDER_TORCHRUN):
        count = spec.config.get("nproc_per_node") or settings.gpus_per_node or 2
        lines = [
            f"set -- {python} -m mixtral_run.launch.torchrun --nnodes {settings.nodes} --nproc-per-node {count} \\",
            '    --rdzv-backend c10d --rdzv-endpoint "$MIXTRAL_RUN_RENDEZVOUS" \\',
            '    --rdzv-id "$MIXTRAL_RUN_RENDEZVOUS_ID" \\',
            '    --rdzv-conf join_timeout=1800 ${own:+--local-addr "$own"} --max-restarts 0 \\',
            f"    {verb}",
        ]
    else:
        lines = [f"set -- {python} {verb}"]
    if _resumes(spec):
        lines.append('if [ "$MIXTRAL_RUN_ATTEMPT" -gt 0 ]; then set -- "$@" --resume auto; fi')
    return lines


def _resumes(spec: JobSpec) -> bool:
    return can_resume(spec.config)


def _docker(spec: JobSpec, settings: SlurmConfig) -> list[str]:
    options, folders = spec.options, spec.options.folders()
    words = ["docker", "run", "--rm", "--init", *CONFINEMENT, "--shm-size", options.shm_size, "--network", "host"]
    words += [] if settings.gpus_per_node else READ_ONLY_ROOT
    if options.ulimits != ("none",):
        words += [word for limit in options.ulimits for word in ("--ulimit", limit)]
    words += bind(folders.checkpoints, CHECKPOINTS) + bind(folders.hf_home, HF_HOME)
    words += [word for mount in spec.mounts for word in bind(mount, mount)]
    words += ["--workdir", CHECKPOINTS]
    names = [*_environment(spec, settings), "GLOO_SOCKET_IFNAME"]
    words += [word for name in names for word in ("--env", name)]
    return [
        "# Slurm kills the client only: a container that is left from an earlier attempt must not run on.",
        'docker rm --force "mixtral-run-$SLURM_JOB_ID" >/dev/null 2>&1',
        *(_DOCKER_GPUS if settings.gpus_per_node else ["gpus=()"]),
        *(_DOCKER_RDMA if settings.nodes > 1 else ["rdma=()"]),
        f"exec {shlex.join(words)} \\",
        '    --name "mixtral-run-$SLURM_JOB_ID" --user "$(id -u):$(id -g)" \\',
        f'    --group-add "$(stat -c %g {shlex.quote(folders.checkpoints)})" "${{gpus[@]}}" "${{rdma[@]}}" \\',
        f'    --mount "type=bind,source=$MIXTRAL_RUN_JOB_FOLDER,target={JOB_FOLDER},readonly" \\',
        f'    --mount "type=bind,source=$kernels,target={KERNELS}" \\',
        f'    {shlex.quote(options.image)} "$@"',
    ]


_DOCKER_GPUS = [
    'gpus=(--gpus "\\"device=$CUDA_VISIBLE_DEVICES\\"")',
    "if docker info --format '{{json .}}' 2>/dev/null | grep -q 'nvidia\\.com/gpu'; then",
    "    gpus=()",
    '    for gpu in ${CUDA_VISIBLE_DEVICES//,/ }; do gpus+=(--device "nvidia.com/gpu=$gpu"); done',
    "fi",
]
"""Lines that give a container the GPUs that Slurm gave the job."""
_DOCKER_RDMA = [
    "rdma=()",
    "if [ -e /dev/infiniband/uverbs0 ]; then",
    "    # NCCL registers its buffers with the device, which pins them.",
    "    rdma=(--device /dev/infiniband --ulimit memlock=-1)",
    '    if [ "$(stat -c %A /dev/infiniband/uverbs0 | cut -c 9)" != w ]; then',
    '        rdma+=(--group-add "$(stat -c %g /dev/infiniband/uverbs0)")',
    "    fi",
    "fi",
]
"""Lines that give a container the InfiniBand or RoCE devices of its node, for NCCL between nodes."""


def _mounts(spec: JobSpec) -> list[str]:
    """Return SOURCE:TARGET for the folders of the node, apart from that of the job."""
    folders = spec.options.folders()
    pairs = [
        (folders.checkpoints, CHECKPOINTS),
        (folders.hf_home, HF_HOME),
        *((each, each) for each in spec.mounts),
    ]
    odd = [source for source, _ in pairs if set(source) & set(",:")]
    if odd:
        raise ConfigError("This container runtime mounts no path with , or : in it.", problems=odd)
    return [f"{source}:{target}" for source, target in pairs]


def _apptainer_image(image: str) -> str:
    return image if image.endswith(".sif") else f"docker://{image}"


def _enroot_image(image: str) -> str:
    """Return an image as Pyxis names it: # after the registry."""
    registry, slash, rest = image.partition("/")
    is_registry = slash and registry and (re.search(r"[.:]", registry) or registry == "localhost")
    return f"{registry}#{rest}" if is_registry and not image.endswith(".sqsh") else image


def _srun(spec: JobSpec, settings: SlurmConfig) -> str:
    """Return the lines that start the step and wait for it."""
    # With --kill-on-bad-exit the node that ends first kills another one that is still saving.
    words = ["srun", "--kill-on-bad-exit=0", "--cpu-bind=none", *(["--label"] if settings.nodes > 1 else [])]
    if settings.cpus_per_task is not None:
        words.append(f"--cpus-per-task={settings.cpus_per_task}")
    lines = [shlex.join(words)]
    if settings.container_runtime == "enroot":
        lines[0] += " " + shlex.join(
            [f"--container-image={_enroot_image(spec.options.image)}", f"--container-workdir={CHECKPOINTS}"]
        )
        mounts = shlex.quote(",".join(_mounts(spec)))
        lines.append('kernels=$HOME/.cache/mixtral-run/kernels; mkdir -p "$kernels"')
        lines[0] += " --no-container-mount-home --no-container-entrypoint"
        # Else the values that the image has for these variables take precedence.
        lines[0] += f" --container-env={','.join(_environment(spec, settings))}"
        lines[0] += f' --container-mounts={mounts},"$job_folder:{JOB_FOLDER}:ro,$kernels:{KERNELS}"'
    step = [*lines[1:], f'{lines[0]} bash -c "$on_node" mixtral-run &']
    return _STEP.format(step="\n".join(step))


_STEP = """\
# Slurm sends USR1 to this script before the time limit. The step gets TERM by scancel, not through srun: a signal
# to srun makes it kill all processes at once, and nothing would be saved.
ask_to_save() {{
    say "the time limit is near: asking the job to save, $(date -u +%FT%TZ)"
    scancel --signal=TERM "$SLURM_JOB_ID"
}}
trap ask_to_save USR1

cd "$job_folder" || exit 3
{step}
srun_pid=$!
# bash runs the trap as soon as wait is interrupted, and wait must then be called again.
while kill -0 "$srun_pid" 2>/dev/null; do wait "$srun_pid"; done
wait "$srun_pid"
code=$?
"""

_END = """\
echo "$code" >"$job_folder/outcome"
end() {{ say "$1"; exit "$code"; }}
if [ "$code" -eq 0 ]; then end "{verb} is done"; fi
if [ -e "$job_folder/stopped" ]; then end "stopped, as requested (exit code $code)"; fi
case $code in
    {incurable}) end "exit code $code: repeating cannot help, see the error above" ;;
esac
if [ "$attempt" -ge "$max_restarts" ]; then
    end "exit code $code, and no restart is left (--max-restarts $max_restarts)"
fi
# scancel ends the processes before this script: what was canceled must stay so.
if ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=RUNNING '; then end "canceled (exit code $code)"; fi
say "exit code $code: queued again, restart $((attempt + 1)) of at most $max_restarts"
# --requeue alone is for failures of nodes; a job that ended by itself must ask.
scontrol requeue "$SLURM_JOB_ID" || end "the job could not be queued again"
exit "$code"
"""


def sbatch_words(words: Sequence[str]) -> list[str]:
    """Return `sbatch WORDS` without the variables of sbatch that would take precedence over the script."""
    names = (
        "ACCOUNT", "ARRAY_INX", "CHDIR", "CONSTRAINT", "CONTAINER", "CPUS_PER_TASK", "ERROR", "EXCLUSIVE",
        "GPUS_PER_NODE", "INPUT", "JOB_NAME", "NO_REQUEUE", "OPEN_MODE", "OUTPUT", "PARTITION", "QOS", "REQUEUE",
        "SIGNAL", "TIMELIMIT", "WAIT",
    )  # fmt: skip
    return ["env", *(word for name in names for word in ("-u", f"SBATCH_{name}")), "sbatch", *words]
