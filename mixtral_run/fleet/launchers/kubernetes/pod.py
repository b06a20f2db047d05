"""The pod of a job: container, volumes, environment and confinement, as values of the API. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mixtral_run.config.launchers.kubernetes import KubernetesConfig, parse_secret, parse_selector, parse_toleration
from mixtral_run.fleet.jobs.container_paths import CHECKPOINTS, HF_HOME, JOB_FOLDER, KERNELS
from mixtral_run.fleet.jobs.job_spec import LABEL_JOB, LABEL_VERB, STOP_SECONDS, JobSpec

Values = dict[str, Any]

GPU = "nvidia.com/gpu"
READER, LABEL_READER = "fetch", "org.mixtral-run.fetch"
"""Name of the container, and label of the pod, that `fetch` reads through."""
READER_SECONDS = 6 * 3600
WRITABLE = ("/tmp", "/home/mixtral")
"""Folders that a job writes to where the root of its container is read-only, which is only without GPUs: the hooks of
NVIDIA's toolkit write into the root."""


OPTIONAL_STORE_KEYS = ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL")
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", *OPTIONAL_STORE_KEYS)
"""Variables of a job that come from --store-secret, by keys of the same names."""


def labels(spec: JobSpec) -> dict[str, str]:
    """Return the labels of all objects of a job."""
    return {LABEL_JOB: spec.name, LABEL_VERB: spec.verb}


def num_processes(spec: JobSpec, settings: KubernetesConfig) -> int:
    """Return the number of processes of a pod."""
    return int(spec.config.get("nproc_per_node") or settings.gpus_per_node or 2)


def environment(spec: JobSpec, settings: KubernetesConfig) -> list[Values]:
    """Return the environment of the container. The token comes from a Secret and is in no manifest."""
    patience = str(STOP_SECONDS + 60)  # as in a container on a host (job_spec.py)
    found = {"PYTHONUNBUFFERED": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": patience, "TRITON_CACHE_DIR": KERNELS}
    if spec.options.nccl_debug:
        found["NCCL_DEBUG"] = spec.options.nccl_debug
    found |= dict(pair.split("=", 1) for pair in spec.options.environment)
    # Kubernetes would replace $(NAME) in a value; $$ is a dollar sign.
    entries: list[Values] = [{"name": name, "value": value.replace("$", "$$")} for name, value in found.items()]
    if settings.token_secret is not None:
        name, key = parse_secret(settings.token_secret)
        entries.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": name, "key": key}}})
    if settings.store_secret is not None:
        for name in STORE_KEYS:
            wanted: Values = {"name": settings.store_secret, "key": name}
            if name in OPTIONAL_STORE_KEYS:
                wanted["optional"] = True
            entries.append({"name": name, "valueFrom": {"secretKeyRef": wanted}})
    return entries


def resources(settings: KubernetesConfig) -> Values:
    """Return requests and limits of the container. GPUs and memory have one value for both."""
    limits: Values = {GPU: settings.gpus_per_node} if settings.gpus_per_node else {}
    if settings.pod_memory is not None:
        limits["memory"] = settings.pod_memory
    cpus = {"cpu": settings.pod_cpus} if settings.pod_cpus is not None else {}
    return {key: value for key, value in (("limits", limits), ("requests", {**limits, **cpus})) if value}


def container_security(settings: KubernetesConfig) -> Values:
    """Return the confinement of the container: that of a job on a host, in the terms of the profile `restricted`."""
    found: Values = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return found if settings.gpus_per_node else {**found, "readOnlyRootFilesystem": True}


def pod_security(settings: KubernetesConfig) -> Values:
    """Return user, group and system calls of the pod. Volumes belong to the group."""
    uid, gid = (int(number) for number in settings.run_as.split(":"))
    return {
        "runAsNonRoot": True,
        "runAsUser": uid,
        "runAsGroup": gid,
        "fsGroup": gid,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def volumes(spec: JobSpec, settings: KubernetesConfig) -> tuple[list[Values], list[Values]]:
    """Return the volumes of the pod, and the mounts of the container."""
    temporary = {KERNELS: "kernels"}
    if HF_HOME not in {each.path for each in settings.volumes}:
        temporary[HF_HOME] = "huggingface"
    if not settings.gpus_per_node:
        temporary |= {path: path.strip("/").replace("/", "-") for path in WRITABLE}
    shm = {"medium": "Memory", "sizeLimit": quantity(spec.options.shm_size)}
    found: list[Values] = [{"name": "shm", "emptyDir": shm}, {"name": "job", "configMap": {"name": spec.name}}]
    mounts: list[Values] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "job", "mountPath": JOB_FOLDER, "readOnly": True},
    ]
    for path, name in temporary.items():
        found.append({"name": name, "emptyDir": {}})
        mounts.append({"name": name, "mountPath": path})
    names: dict[tuple[str, bool], str] = {}
    for volume in settings.volumes:
        # A claim with several paths is one volume of the pod.
        key = (volume.source, volume.is_claim)
        if key not in names:
            names[key] = f"volume-{len(names) + 1}"
            source: Values = {"hostPath": {"path": volume.source, "type": "Directory"}}
            if volume.is_claim:
                source = {"persistentVolumeClaim": {"claimName": volume.source}}
            found.append({"name": names[key], **source})
        mount: Values = {"name": names[key], "mountPath": volume.path}
        mounts.append({**mount, "readOnly": True} if volume.read_only else mount)
    return found, mounts


def quantity(size: str) -> str:
    """Return a size of `docker run --shm-size` as a quantity of the API: 32g is 32Gi."""
    found = re.fullmatch(r"(\d+)([kmg]?)b?", size.lower())
    assert found is not None, "JobOptions.check accepts no other form"
    return found[1] + {"": "", "k": "Ki", "m": "Mi", "g": "Gi"}[found[2]]


def placement(settings: KubernetesConfig) -> Values:
    """Return what chooses the nodes: labels that they must have, and taints that the pods accept."""
    found: Values = {}
    if settings.node_selector:
        found["nodeSelector"] = dict(parse_selector(text) for text in settings.node_selector)
    # Clusters keep other pods off their GPU nodes with this taint.
    tolerations: list[Values] = [_tolerated(GPU, "", "NoSchedule")] if settings.gpus_per_node else []
    for text in settings.toleration:
        given = parse_toleration(text)
        one = _tolerated(given.key, given.value, given.effect)
        tolerations += [one] if one not in tolerations else []
    return {**found, "tolerations": tolerations} if tolerations else found


def _tolerated(key: str, value: str, effect: str) -> Values:
    found = {"key": key, "operator": "Equal", "value": value} if value else {"key": key, "operator": "Exists"}
    return {**found, "effect": effect} if effect else dict(found)


def reader_pod(spec: JobSpec, settings: KubernetesConfig) -> Values:
    """Return a pod that only holds the volumes of a job, read-only, for `fetch`. It ends by itself."""
    pod_volumes, mounts = volumes(spec, settings)
    own = [each for each in mounts if each["name"].startswith("volume-")]
    names = {each["name"] for each in own}
    container: Values = {
        "name": READER,
        "image": spec.options.image,
        "command": ["sleep", str(READER_SECONDS)],
        "securityContext": {**container_security(settings), "readOnlyRootFilesystem": True},
        "volumeMounts": [{**each, "readOnly": True} for each in own],
    }
    found: Values = {} if settings.pull_secret is None else {"imagePullSecrets": [{"name": settings.pull_secret}]}
    metadata: Values = {"name": f"{spec.name}-{READER}", "labels": {LABEL_READER: spec.name}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {
            **found,
            "restartPolicy": "Never",
            "activeDeadlineSeconds": READER_SECONDS,
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": pod_security(settings),
            **placement(settings),
            "containers": [container],
            "volumes": [each for each in pod_volumes if each["name"] in names],
        },
    }


def pod_spec(spec: JobSpec, settings: KubernetesConfig, program: Mapping[str, list[str]]) -> Values:
    """Return the pod of a plain Job. program: `command` and `args` of its container."""
    pod_volumes, mounts = volumes(spec, settings)
    address: Values = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    variables = [*([address] if spec.num_hosts > 1 else []), *environment(spec, settings)]
    container: Values = {
        "name": "trainer",
        "image": spec.options.image,
        **program,
        "workingDir": CHECKPOINTS,
        "env": variables,
        "resources": resources(settings),
        "securityContext": container_security(settings),
        "volumeMounts": mounts,
    }
    found: Values = {}
    if settings.service_account is not None:
        found["serviceAccountName"] = settings.service_account
    if settings.pull_secret is not None:
        found["imagePullSecrets"] = [{"name": settings.pull_secret}]
    return {
        **found,
        # A pod that failed is replaced by a new one, which the policy for its exit code decides.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": STOP_SECONDS,
        # The job asks the cluster for nothing. Its first process gets signals as any other, and orphans are reaped.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "shareProcessNamespace": True,
        "securityContext": pod_security(settings),
        **placement(settings),
        "containers": [container],
        "volumes": pod_volumes,
    }
