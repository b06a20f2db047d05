"""Manifest of a job: a plain Indexed Job, or a TrainJob of Kubeflow Trainer, from the same job spec as `--on`.

Pure functions. The objects are dicts in the form of the API; `to_yaml` (yaml_text.py) writes them.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mixtral_run.config.data import DATA_SETTINGS
from mixtral_run.config.data_sources import parse_source
from mixtral_run.config.fields import flag_of
from mixtral_run.config.launchers.kubernetes import KubernetesConfig, Volume, is_label
from mixtral_run.config.names.store_names import store_url, without_weight
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.jobs.container_paths import CHECKPOINTS, HF_HOME, JOB_FOLDER, hides_image
from mixtral_run.fleet.jobs.job_spec import (
    LABEL_JOB,
    LABEL_NUM_HOSTS,
    LABEL_OUTPUT,
    SCRATCH,
    STOP_SECONDS,
    WRITTEN,
    JobOptions,
    JobSpec,
)
from mixtral_run.fleet.launchers.kubernetes.pod import (
    Values,
    container_security,
    environment,
    labels,
    num_processes,
    placement,
    pod_security,
    pod_spec,
    quantity,
    resources,
    volumes,
)
from mixtral_run.fleet.launchers.kubernetes.state import INDEX_LABEL

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
FINAL_EXIT_CODES = (2, 3, 4, 5)
"""Exit codes of the kit that a further attempt would give again: settings, host, check, weights (errors.py)."""
KEPT_SECONDS = 7 * 24 * 3600
"""Time that a finished Job keeps its pods, and with them their output."""
MAX_NAME = 52
"""The index of a pod is appended to the name of a Job, and both together are a label of DNS."""
MAX_CONFIG_MAP = 1_000_000
"""Bytes that the files of a job may have as the API counts them; it accepts 1 MiB."""
MANAGER = "org.mixtral-run/launcher"
NODE = "node"
"""Replicated job and container of Kubeflow's runtimes that train."""


def manifest(spec: JobSpec, settings: KubernetesConfig) -> list[Values]:
    """Return the objects of a job, the Job or TrainJob last.

    Raises ConfigError with all problems: a path in no volume, a file that is too large, an image of no registry.
    """
    files, problems = _files(spec)
    problems += job_problems(spec, settings)
    if problems:
        raise ConfigError("The job cannot be handed over to Kubernetes.", problems=problems)
    found = [_config_map(spec, settings, files)]
    if settings.crd == "trainjob":
        return [*found, _train_job(spec, settings)]
    if spec.num_hosts > 1:
        found.append(_service(spec, settings))
    return [*found, _job(spec, settings)]


def job_problems(spec: JobSpec, settings: KubernetesConfig) -> list[str]:
    """Return a line for each part of a job that does not work in pods with these settings."""
    found = []
    if not is_label(spec.name) or len(spec.name) > MAX_NAME:
        found.append(f"the job's name: expected at most {MAX_NAME} lower-case letters, digits, dashes; {spec.name!r}")
    if spec.options.image == JobOptions.image:
        found.append(
            f"--image: expected an image of a registry that the nodes reach; found {spec.options.image}, which "
            "bootstrap builds on a host: docker tag it and docker push it"
        )
    if settings.crd == "trainjob" and spec.options.max_restarts:
        found.append(
            "--max-restarts: a TrainJob has no setting for it; its runtime has one, the failurePolicy of the JobSet in "
            f"{settings.runtime}; found {spec.options.max_restarts}"
        )
    given = spec.config.get("nproc_per_node")
    if given and settings.gpus_per_node and given > settings.gpus_per_node and spec.config.get("device") != "cpu":
        found.append(f"--nproc-per-node: expected at most the {settings.gpus_per_node} GPUs of a pod; found {given}")
    if settings.pod_memory is not None and _bytes(quantity(spec.options.shm_size)) >= _bytes(settings.pod_memory):
        found.append(
            f"--pod-memory: expected more than --shm-size, which counts against it; found {settings.pod_memory} and "
            f"{spec.options.shm_size}"
        )
    return found + _volume_problems(spec, settings.volumes) + _store_problems(spec, settings.volumes)


def _volume_problems(spec: JobSpec, given: Sequence[Volume]) -> list[str]:
    found = [
        f"--volume: {each.path} of the container would hide a folder that the job needs"
        for each in given
        if hides_image(each.path) or any(_is_below(each.path, own) for own in (JOB_FOLDER, "/dev", "/tmp"))
    ]
    for name, path in _paths(spec):
        volume, is_written = _volume_of(path, given), name in WRITTEN or (spec.verb, name) == ("smoke", "load")
        if volume is None:
            if any(_is_below(path, folder) for folder in (*spec.mounts, CHECKPOINTS)):
                folder = str(PurePosixPath(path).parent)
                found.append(f"{flag_of(name)}: no --volume has {path}; add one, such as pvc/NAME:{folder}")
        elif is_written and volume.read_only:
            found.append(f"{flag_of(name)}: {path} is written to; found a volume that is only read, at {volume.path}")
        elif is_written and volume.path == path:
            found.append(f"{flag_of(name)}: expected a path below the volume at {path}; found the volume itself")
    home = _volume_of(HF_HOME, given)
    if home is not None and home.read_only:
        found.append(f"--volume: {HF_HOME} is written to; found :ro")
    return found


def _store_problems(spec: JobSpec, given: Sequence[Volume]) -> list[str]:
    """Return a line for each setting with a URL if the copies of the store's folders would end with the pod."""
    variables = dict(pair.split("=", 1) for pair in spec.options.environment)
    folder = variables.get(SCRATCH.rstrip("="), HF_HOME)
    volume = _volume_of(folder, given)
    if volume is not None and not volume.read_only:
        return []
    return [
        f"{flag_of(name)}: copies of a store's folders are made in {folder}; expected a --volume that has it and is "
        f"written to, or --env {SCRATCH}{CHECKPOINTS}/stores; found none, so that they would end with the pod"
        for name, value in spec.config.items()
        if any(store_url(without_weight(each)) for each in (value if isinstance(value, list) else [value]))
    ]


def _paths(spec: JobSpec) -> Iterator[tuple[str, str]]:
    """Yield the settings of a job that may be paths inside the container, each with its value."""
    for name, value in spec.config.items():
        if name in DATA_SETTINGS:
            yield from ((name, parse_source(text).location) for text in value)
        elif isinstance(value, str) and value.startswith("/"):
            yield name, value


def _volume_of(path: str, given: Sequence[Volume]) -> Volume | None:
    """Return the volume that holds a path: the one that is mounted the furthest down."""
    holding = [each for each in given if _is_below(path, each.path)]
    return max(holding, key=lambda each: len(each.path), default=None)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _bytes(text: str) -> int:
    digits = text.rstrip("KMGTi")
    power = " KMGT".index(text[len(digits) : len(digits) + 1] or " ")
    return int(digits) << (10 * power)


def _files(spec: JobSpec) -> tuple[dict[str, bytes], list[str]]:
    """Return the files of the job's folder, and a line for each that cannot travel in a ConfigMap."""
    files, problems = {"config.json": spec.config_json().encode()}, []
    left = MAX_CONFIG_MAP - len(files["config.json"])
    for path, name in spec.files:
        size = _size(path)
        if size > left:
            problems.append(
                f"{path}: it has {size:,} bytes, and a manifest has room for {max(left, 0):,}; copy it to a volume and "
                "give its path there, such as /data/NAME"
            )
            continue
        files[name] = path.read_bytes()
        left -= size
    return files, problems


def _size(path: Path) -> int:
    """Return the bytes of a file in a ConfigMap, which holds what is no text as base64."""
    size = path.stat().st_size
    return size if size > MAX_CONFIG_MAP or _text(path.read_bytes()) is not None else -(-size // 3) * 4


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _metadata(spec: JobSpec, settings: KubernetesConfig, **more: Any) -> Values:
    found: Values = {"name": spec.name}
    if settings.namespace is not None:
        found["namespace"] = settings.namespace
    return {**found, "labels": {**labels(spec), **more.pop("labels", {})}, **more}


def _config_map(spec: JobSpec, settings: KubernetesConfig, files: dict[str, bytes]) -> Values:
    texts = {name: text for name, data in files.items() if (text := _text(data)) is not None}
    others = {name: base64.b64encode(data).decode() for name, data in files.items() if name not in texts}
    found: Values = {
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(spec, settings), "immutable": True, "data": texts
    }  # fmt: skip
    return {**found, "binaryData": others} if others else found


def _service(spec: JobSpec, settings: KubernetesConfig) -> Values:
    """Return the headless Service by which the pods find the first one, before it counts as ready.

    Its name is the host name of the first pod: torchrun compares the two to tell whether the others connect to it. With
    another name torchrun would ask DNS, which may not know the pod yet.
    """
    ports = [{"name": "rendezvous", "port": spec.options.rendezvous_port}]
    selector = {LABEL_JOB: spec.name, INDEX_LABEL: "0"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**_metadata(spec, settings), "name": _first_pod(spec)},
        "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": selector, "ports": ports},
    }


def _first_pod(spec: JobSpec) -> str:
    """Return the host name of the first pod of an Indexed Job."""
    return f"{spec.name}-0"


def _owned(spec: JobSpec, settings: KubernetesConfig) -> Values:
    """Return the metadata of the Job or TrainJob: what other programs ask about it."""
    notes = {LABEL_NUM_HOSTS: str(spec.num_hosts), **({LABEL_OUTPUT: spec.output} if spec.output else {})}
    queue = {QUEUE_LABEL: settings.queue} if settings.queue is not None else {}
    return _metadata(spec, settings, labels=queue, annotations=notes)


def _limits(settings: KubernetesConfig) -> Values:
    found: Values = {"suspend": True} if settings.queue is not None else {}  # Kueue starts it
    if settings.deadline_hours is not None:
        found["activeDeadlineSeconds"] = max(1, round(settings.deadline_hours * 3600))
    return found


def _job(spec: JobSpec, settings: KubernetesConfig) -> Values:
    rules: list[Values] = [
        # The node was drained or the pod preempted.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "trainer", "operator": "In", "values": list(FINAL_EXIT_CODES)},
        },
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _owned(spec, settings),
        "spec": {
            **_limits(settings),
            "completions": spec.num_hosts,
            "parallelism": spec.num_hosts,
            "completionMode": "Indexed",
            # Once a pod has failed, the others fail as well: each of them counts.
            "backoffLimit": (spec.options.max_restarts or 0) * spec.num_hosts,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": labels(spec)},
                "spec": pod_spec(spec, settings, _program(spec, settings)),
            },
        },
    }


def _program(spec: JobSpec, settings: KubernetesConfig) -> dict[str, list[str]]:
    own = [spec.verb, "--config", f"{JOB_FOLDER}/config.json"]
    if spec.num_hosts == 1:
        return {"command": ["mixtral-run"], "args": own}
    # Kubernetes replaces $(POD_IP). A node may load the image for long before the others find its pod.
    endpoint = f"{_first_pod(spec)}:{spec.options.rendezvous_port}"
    return {
        "command": ["python", "-m", "mixtral_run.launch.torchrun"],
        "args": [
            f"--nnodes={spec.num_hosts}", f"--nproc-per-node={num_processes(spec, settings)}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={spec.name}",
            "--rdzv-conf=join_timeout=1800,read_timeout=1800", "--local-addr=$(POD_IP)", "--max-restarts=0",
            "-m", "mixtral_run", *own,
        ],
    }  # fmt: skip


def _train_job(spec: JobSpec, settings: KubernetesConfig) -> Values:
    pod_volumes, mounts = volumes(spec, settings)
    container = {"name": NODE, "securityContext": container_security(settings), "volumeMounts": mounts}
    pod: Values = {
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "securityContext": pod_security(settings),
        **placement(settings),
        "containers": [container],
        "volumes": pod_volumes,
    }
    if settings.service_account is not None:
        pod["serviceAccountName"] = settings.service_account
    if settings.pull_secret is not None:
        pod["imagePullSecrets"] = [{"name": settings.pull_secret}]
    template = {"metadata": {"labels": labels(spec)}, "spec": pod}
    patch = {"template": {"spec": {"replicatedJobs": [{"name": NODE, "template": {"spec": {"template": template}}}]}}}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _owned(spec, settings),
        "spec": {
            **_limits(settings),
            "runtimeRef": {"name": settings.runtime},
            "trainer": {
                "image": spec.options.image,
                "numNodes": spec.num_hosts,
                "numProcPerNode": num_processes(spec, settings),
                # The trainer sets PET_NNODES, PET_MASTER_ADDR and others, which torchrun reads.
                "command": ["python", "-m", "mixtral_run.launch.torchrun"],
                "args": [
                    "--max-restarts=0", "-m", "mixtral_run", spec.verb, "--config", f"{JOB_FOLDER}/config.json"
                ],
                "env": environment(spec, settings),
                "resourcesPerNode": resources(settings),
            },
            "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": patch}],
        },
    }  # fmt: skip
