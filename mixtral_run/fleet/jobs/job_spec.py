"""Description of a job for a host: its files, its mounts and the argument list of its container. Pure functions."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixtral_run.config.data import CHAT_TEMPLATES, DATA_SETTINGS
from mixtral_run.config.fields import Config, field_types, flag_of, plain_type
from mixtral_run.config.names.hub_names import HF_MODEL_SETTINGS, may_be_hub_name
from mixtral_run.config.names.store_names import store_url
from mixtral_run.config.verbs.training import can_resume
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.host_folders import HostFolders, folders_of
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.container_paths import (
    CHECKPOINTS,
    HF_HOME,
    JOB_FOLDER,
    JOB_STATE,
    KERNELS,
    adapters_inside,
    data_inside,
    mount_for,
    path_inside,
)
from mixtral_run.fleet.jobs.host_facts import HostFacts

LABEL_JOB = "org.mixtral-run.job"
LABEL_VERB = "org.mixtral-run.verb"
LABEL_OUTPUT = "org.mixtral-run.output"
LABEL_NUM_HOSTS = "org.mixtral-run.num_hosts"

STATE_FOLDER = "state"
"""Folder in a job's folder on the host that is JOB_STATE in the container."""
STOP_SECONDS = 330
"""Time that a job has to save after SIGTERM, before the engine kills it."""
RENDEZVOUS_PORT = 29400
SECRET_VARIABLES = re.compile(r"TOKEN|PASSWORD|SECRET|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY", re.IGNORECASE)
OUTPUTS = ("save", "output_path", "work_path", "output")
"""Config fields that name the output of a job, in the order of preference."""
WRITTEN = (*OUTPUTS, "metrics_file", "output_file", "logits_file", "data_cache")
"""All config fields that name a path that a job writes. smoke also writes its --load."""
SCRATCH = "MIXTRAL_RUN_STORE_CACHE="
"""Variable of a job with its value behind: the folder of the copies of what an object store holds."""
LOCAL_INPUTS = ("prompts_file", "prompts", "chat_template")
"""Config fields, apart from those of data, whose file may be on the operator's machine. It is then sent to the host."""
ALWAYS_SENT = (
    "tensor_model_parallel_size", "expert_model_parallel_size", "layout", "resume", "train_iters", "data_path",
    "valid_data_path", "adapter", "clip_grad", "optimizer",
)  # fmt: skip
"""Settings that a job's config has even at their defaults, since these were others in earlier versions of the kit.

Other defaults are left out: the image may hold an earlier version, which refuses names that it does not know. A version
that knows the name has the same default, as a default never changes without being named here; and one that does not
know it does what the default says, as the default of a new setting is what the kit did before it.
"""

DEFAULT_ULIMITS = ("memlock=-1", "stack=67108864", "nofile=1048576:1048576")
"""Limits for pinned memory (NCCL), thread stacks, and open files, for which Docker 29 allows 1,024."""

CONFINEMENT = ("--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "16384")
"""A job needs no capability and no set-user-ID program. The limit counts threads: 8 processes use about 2,000."""
READ_ONLY_ROOT = ("--read-only", "--tmpfs", "/tmp:exec,mode=1777", "--tmpfs", "/home/mixtral:exec,mode=1777")
"""Only without GPUs: NVIDIA's CDI hooks write into the root of the container and fail where it is read-only."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """Settings of a job on hosts, apart from the settings of its verb."""

    on: tuple[str, ...] = ()
    inventory: Path | None = None
    image: str = "mixtral-run:local"
    shm_size: str = "32g"
    environment: tuple[str, ...] = ()
    ulimits: tuple[str, ...] = DEFAULT_ULIMITS
    """Limits as `docker run --ulimit` takes them; "none" keeps the engine's defaults."""
    checkpoints_folder: str | None = None
    hf_home: str | None = None
    """Folders of the hosts. None: each host's own, see `folders`."""
    min_hosts: int | None = None
    """Hosts that are enough to start again on, once others are lost."""
    max_restarts: int | None = None
    """Times that the whole job is started again; None is the default of the launcher."""
    nccl_debug: str | None = None
    nccl_timeout: int | None = None
    rendezvous_address: str | None = None
    rendezvous_port: int = RENDEZVOUS_PORT
    detach: bool = False
    wait: str | None = None
    """Longest time to wait for a free host, such as 2h; "forever"; None is not to wait."""
    share: bool = False
    """Start on hosts that run another job as well."""

    def folders(self, host: Host | None = None) -> HostFolders:
        """Return the folders of a host; the default ones for a node of a scheduler, which is no Host."""
        return folders_of(host, self.checkpoints_folder, self.hf_home)

    def restarts_container(self, num_hosts: int) -> bool:
        """Return True if the engine starts the container again. A job on several hosts starts again as a whole."""
        return bool(self.max_restarts) and num_hosts == 1

    def check(self) -> None:
        """Raise ConfigError with all problems."""
        problems = []
        if not re.fullmatch(r"[1-9]\d*[kmgKMG]?b?", self.shm_size):
            problems.append(f"--shm-size: expected a size such as 64g; found {self.shm_size!r}")
        if not re.fullmatch(r"/?[A-Za-z0-9][\w./:@-]*", self.image):
            problems.append(f"--image: expected the name of an image; found {self.image!r}")
        for pair in self.environment:
            name, equals, _ = pair.partition("=")
            if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
                problems.append(f"--env: expected NAME=VALUE; found {pair!r}")
            elif SECRET_VARIABLES.search(name):
                problems.append(
                    f"--env {name}: `docker inspect` or a manifest would show the value; for a token use "
                    "bootstrap --hf-token-file, or --token-secret with --launcher kubernetes; for keys of a store "
                    "bootstrap --store-keys-file, which writes HF_HOME/store-credentials, or --store-secret"
                )
        for limit in self.ulimits if self.ulimits != ("none",) else ():
            if not re.fullmatch(r"[a-z]+=-?\d+(:-?\d+)?", limit):
                problems.append(f"--ulimit: expected NAME=SOFT:HARD, or none; found {limit!r}")
        for flag, folder in (("--checkpoints-folder", self.checkpoints_folder), ("--hf-home", self.hf_home)):
            if folder is not None and not folder.startswith("/"):
                problems.append(f"{flag}: expected an absolute path on the host; found {folder!r}")
        if self.wait is not None and not re.fullmatch(r"forever|\d{1,6}[smhd]?", self.wait):
            problems.append(f"--wait: expected a time such as 30m or 2h, or no value; found {self.wait!r}")
        if self.wait is not None and self.share:
            problems.append("--wait, --share: expected one of them; found both")
        if self.min_hosts is not None and self.detach:
            problems.append("--min-hosts: expected no --detach, as this command starts the job again; found both")
        if self.nccl_timeout is not None and self.nccl_timeout < 60:
            problems.append(f"--nccl-timeout: expected at least 60 seconds; found {self.nccl_timeout}")
        if problems:
            raise ConfigError("Some settings of the job are wrong.", problems=problems)


@dataclass(frozen=True, kw_only=True)
class Container:
    """What differs from the container of a verb that runs detached.

    attach: Options in place of --detach. program: Words in place of the verb's; None for the verb. more: Further
    options. environment: Further variables.
    """

    attach: tuple[str, ...] = ("--detach",)
    program: tuple[str, ...] | None = None
    more: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """A job. All its hosts get the same."""

    name: str
    verb: str
    config: Mapping[str, Any]
    """Config of the verb; its paths are paths inside the container."""
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Defaults of the verb's settings, which the job's file leaves out."""
    mounts: tuple[str, ...] = ()
    """Absolute folders of the host that are mounted at the same path in the container."""
    files: tuple[tuple[Path, str], ...] = ()
    """(local file, name in the job's folder)."""
    options: JobOptions
    num_hosts: int = 1
    rendezvous: str = ""

    @property
    def output(self) -> str | None:
        """Output path of the job inside the container, or None."""
        return next((str(self.config[name]) for name in OUTPUTS if self.config.get(name)), None)

    def config_json(self) -> str:
        """Return the job's file of settings, without those at their defaults. See ALWAYS_SENT."""
        sent = {
            name: value
            for name, value in self.config.items()
            if name in ALWAYS_SENT or name not in self.defaults or value != self.defaults[name]
        }
        return json.dumps(sent, indent=2, ensure_ascii=False) + "\n"


def make_spec(
    name: str, verb: str, config: Config, options: JobOptions, num_hosts: int, rendezvous: str = ""
) -> JobSpec:
    """Create a job from the config of a verb. Local input files are sent along; all other paths are paths on the host.

    A relative path is relative to the host's checkpoints folder. Raises ConfigError for a path that no job can use.
    """
    options.check()
    values = config.to_mapping()
    if (
        num_hosts > 1
        and store_url(values.get("save"))
        and not any(each.startswith(SCRATCH) for each in options.environment)
    ):
        raise ConfigError(
            "A job on several hosts saves in a folder that they share, and copies from there to the store.",
            expected=f"--env {SCRATCH}{CHECKPOINTS}/stores, if the hosts share the checkpoints folder",
            found=f"--save {store_url(values['save'])} without it",
        )
    types = field_types(type(config))
    files: list[tuple[Path, str]] = []
    mounts: dict[str, None] = {}
    for item in dataclasses.fields(config):
        value = values[item.name]
        url = store_url(value) if item.metadata["store"] else None
        if url is not None:
            values[item.name] = url
            continue
        if item.name in DATA_SETTINGS:
            values[item.name] = data_inside(item.name, value, files, mounts)
            continue
        if item.name == "adapter" and isinstance(value, list):
            values[item.name] = adapters_inside(value, mounts)
            continue
        is_path = (
            plain_type(types[item.name])[0] is Path
            or (item.name == "hf_model_path" and str(value).startswith("/"))
            or (item.name == "chat_template" and value not in CHAT_TEMPLATES)
        )
        if value is None or not is_path or (verb != "smoke" and _may_be_on_hub(item.name, value)):
            continue
        if item.name in LOCAL_INPUTS and Path(value).is_file():
            sent = f"{item.name}{Path(value).suffix}"
            files.append((Path(value), sent))
            values[item.name] = f"{JOB_FOLDER}/{sent}"
            continue
        values[item.name] = path = path_inside(value, flag_of(item.name))
        mount = mount_for(path, item.name in WRITTEN or (verb, item.name) == ("smoke", "load"), flag_of(item.name))
        if mount:
            mounts[mount] = None
    if options.nccl_timeout and "distributed_timeout_minutes" in values:
        values["distributed_timeout_minutes"] = -(-options.nccl_timeout // 60)
    return JobSpec(
        name=name, verb=verb, config=values, defaults=config.defaults(), mounts=_outermost(mounts), files=tuple(files),
        options=options, num_hosts=num_hosts, rendezvous=rendezvous,
    )  # fmt: skip


def _may_be_on_hub(name: str, value: str) -> bool:
    """Return True if a value may name a model on the hub. Only the job can tell it from a folder below CHECKPOINTS."""
    return name in HF_MODEL_SETTINGS and may_be_hub_name(value)


def _outermost(folders: Mapping[str, None]) -> tuple[str, ...]:
    return tuple(
        folder for folder in folders if not any(folder != other and folder.startswith(other + "/") for other in folders)
    )


DETACHED = Container()
"""The container of a verb: the job continues when the connection ends."""


def container_argv(spec: JobSpec, facts: HostFacts, container: Container = DETACHED) -> list[str]:
    """Return `docker run …` for one host."""
    options = spec.options
    argv = [*facts.docker, "run", *container.attach, "--init", "--name", spec.name]
    argv += ["--label", f"{LABEL_JOB}={spec.name}", "--label", f"{LABEL_VERB}={spec.verb}"]
    argv += ["--label", f"{LABEL_NUM_HOSTS}={spec.num_hosts}"]
    if spec.output:
        argv += ["--label", f"{LABEL_OUTPUT}={host_path(spec.output, facts.folders)}"]
    if facts.num_gpus:
        argv += ["--device", "nvidia.com/gpu=all"] if facts.cdi else ["--gpus", "all"]
    else:
        argv += READ_ONLY_ROOT
    if options.restarts_container(spec.num_hosts):
        # The engine also does so after a reboot of the host, unless the job was stopped.
        argv += ["--restart", f"on-failure:{options.max_restarts}"]
    argv += [*CONFINEMENT, "--shm-size", options.shm_size, "--stop-timeout", str(STOP_SECONDS)]
    if options.ulimits != ("none",):
        argv += [word for limit in options.ulimits for word in ("--ulimit", limit)]
    argv += ["--user", f"{facts.uid}:{facts.gid}"]
    if facts.group_of_checkpoints not in (None, facts.gid):
        argv += ["--group-add", str(facts.group_of_checkpoints)]
    if spec.num_hosts > 1:
        argv += ["--network", "host", *_rdma(options, facts)]
    argv += bind(facts.folders.checkpoints, CHECKPOINTS) + bind(facts.folders.hf_home, HF_HOME)
    argv += bind(f"{facts.folder}/{spec.name}", JOB_FOLDER, read_only=True) + bind(facts.kernels, KERNELS)
    if options.restarts_container(spec.num_hosts):
        argv += bind(f"{facts.folder}/{spec.name}/{STATE_FOLDER}", JOB_STATE)
    for mount in spec.mounts:
        argv += bind(mount, mount)
    argv += ["--workdir", CHECKPOINTS, *container.more]
    for name, value in {**container.environment, **_environment(spec, facts)}.items():
        argv += ["--env", f"{name}={value}"]
    program = _program(spec, facts) if container.program is None else container.program
    return [*argv, options.image, *program]


def _rdma(options: JobOptions, facts: HostFacts) -> list[str]:
    """Return the options that give a container the InfiniBand or RoCE devices of its host, for NCCL."""
    if not facts.rdma:
        return []
    group = [] if facts.rdma_group is None else ["--group-add", str(facts.rdma_group)]
    # NCCL registers its buffers with the device, which pins them.
    limited = any(limit.startswith("memlock=") for limit in options.ulimits)
    return ["--device", "/dev/infiniband", *group, *([] if limited else ["--ulimit", "memlock=-1"])]


def bind(source: str, target: str, read_only: bool = False) -> list[str]:
    """Return `--mount` for a folder of the host. Unlike --volume it accepts colons and refuses a missing folder."""
    text = io.StringIO()
    fields = ["type=bind", f"source={source}", f"target={target}", *(["readonly"] if read_only else [])]
    csv.writer(text, lineterminator="").writerow(fields)
    return ["--mount", text.getvalue()]


def _environment(spec: JobSpec, facts: HostFacts) -> dict[str, str]:
    # torchrun waits 30 seconds for its processes by default. It gets more time than the engine: the engine then kills a
    # run that does not save in time, with the exit code KILLED. torchrun would end as if the run had saved.
    patience = str(STOP_SECONDS + 60)
    found = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience, "TRITON_CACHE_DIR": KERNELS}
    if spec.num_hosts > 1 and facts.interface:
        # gloo would use the address of the host's name, which is 127.0.1.1 in Debian's /etc/hosts.
        found["GLOO_SOCKET_IFNAME"] = facts.interface
        # NCCL meets and, without RDMA, exchanges data there. It would take the first interface that is up.
        found["NCCL_SOCKET_IFNAME"] = "=" + facts.interface
    if spec.num_hosts > 1 and facts.bridges:
        found["NCCL_IB_HCA"] = "^=" + ",".join(facts.bridges)
    if spec.options.nccl_debug:
        found["NCCL_DEBUG"] = spec.options.nccl_debug
    found |= dict(pair.split("=", 1) for pair in spec.options.environment)
    return found


def _program(spec: JobSpec, facts: HostFacts) -> list[str]:
    config = ["--config", f"{JOB_FOLDER}/config.json"]
    if spec.num_hosts == 1:
        program = ["mixtral-run", spec.verb, *config]
        if not spec.options.restarts_container(1):
            return program
        resumes = ["--resumes"] if can_resume(spec.config) else []
        return ["python", "-m", "mixtral_run.launch.restarts", JOB_STATE, *resumes, *program]
    return torchrun_words(spec, facts, ["-m", "mixtral_run", spec.verb, *config])


def torchrun_words(spec: JobSpec, facts: HostFacts, program: list[str]) -> list[str]:
    """Return the command that runs a program in the processes of a host, which meet those of the other hosts."""
    processes = spec.config.get("nproc_per_node") or facts.num_gpus or 2
    # Without --local-addr a host announces its name, which the other hosts may be unable to resolve.
    own = ["--local-addr", facts.address] if facts.address else []
    return [
        "python", "-m", "mixtral_run.launch.torchrun",
        "--nnodes", str(spec.num_hosts), "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", spec.rendezvous, "--rdzv-id", spec.name,
        *own, "--max-restarts", "0", *program,
    ]  # fmt: skip


def host_path(path: str, folders: HostFolders) -> str:
    """Translate a path inside the container into a path on the host."""
    for inside, outside in ((CHECKPOINTS, folders.checkpoints), (HF_HOME, folders.hf_home)):
        if path == inside or path.startswith(inside + "/"):
            return outside + path[len(inside) :]
    return path
