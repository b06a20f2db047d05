"""Checks of manifests: the schemas of the API, and what the schemas of the API do not say."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

Values = dict[str, Any]
VERSIONS = ("1.31", "1.37")
"""The first version of Kubernetes in which podFailurePolicy is stable, and the newest one with a schema."""
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i|[mkMGTPE])?")
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
LABEL_KEY = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def check_object(values: Values) -> None:
    """Raise if the schema of the API, at any depth, does not know a field, misses one, or has another type."""
    if values["kind"] == "TrainJob":
        read = TrainerV1alpha1TrainJob.from_dict(values)
        assert read is not None
        # The models drop what they do not know.
        assert read.to_dict() == values
    else:
        for version in VERSIONS:
            kubernetes_validate.validate(values, version, strict=True)
    check_metadata(values["metadata"])


def check_metadata(metadata: Values) -> None:
    assert LABEL.fullmatch(metadata.get("name", "x")) and LABEL.fullmatch(metadata.get("namespace", "x"))
    for key, value in metadata.get("labels", {}).items():
        assert LABEL_KEY.fullmatch(key) and LABEL_VALUE.fullmatch(value), (key, value)


def check_pod(pod: Values) -> None:
    """Raise for what the server refuses although the schema accepts it."""
    (container,) = pod["containers"]
    names = [volume["name"] for volume in pod["volumes"]]
    paths = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert len({*names}) == len(names) and all(LABEL.fullmatch(name) for name in names)
    assert len({*paths}) == len(paths)
    assert {mount["name"] for mount in container["volumeMounts"]} == {*names}
    for volume in pod["volumes"]:
        (kind,) = volume.keys() - {"name"}
        assert kind in ("emptyDir", "configMap", "persistentVolumeClaim", "hostPath")
        if kind == "emptyDir":
            assert volume[kind].get("medium", "Memory") == "Memory"
            assert QUANTITY.fullmatch(volume[kind].get("sizeLimit", "1"))
    for toleration in pod.get("tolerations", ()):
        assert toleration.get("effect", "NoExecute") in ("NoSchedule", "PreferNoSchedule", "NoExecute")
        assert (toleration["operator"] == "Equal") == ("value" in toleration)
    assert pod.get("restartPolicy", "Never") in ("Never", "OnFailure")
    # The profile `restricted` of the Pod Security Standards, apart from volumes of the node.
    user, own = pod["securityContext"], container["securityContext"]
    assert user["runAsNonRoot"] is True and user["runAsUser"] > 0
    assert user["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["allowPrivilegeEscalation"] is False and own["capabilities"] == {"drop": ["ALL"]}
    assert not {"privileged", "procMount"} & own.keys()
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()


def check_resources(resources: Values) -> None:
    for amounts in resources.values():
        assert all(QUANTITY.fullmatch(str(amount)) for amount in amounts.values())
    for name, amount in resources.get("limits", {}).items():
        assert resources["requests"][name] == amount


def check_environment(entries: list[Values]) -> None:
    names = [entry["name"] for entry in entries]
    assert len({*names}) == len(names)
    for entry in entries:
        assert ("value" in entry) != ("valueFrom" in entry)
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", entry["name"])
        # Kubernetes replaces $(NAME) unless the dollar sign is doubled.
        assert "$(" not in entry.get("value", "").replace("$$", "")


def check_job(objects: list[Values]) -> None:
    """Raise if the parts of a plain Job do not fit each other."""
    job, service = objects[-1], next((each for each in objects if each["kind"] == "Service"), None)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_pod(pod)
    check_metadata(spec["template"]["metadata"])
    check_resources(container["resources"])
    check_environment(container["env"])
    assert spec["completionMode"] == "Indexed" and spec["podReplacementPolicy"] == "Failed"
    assert spec["completions"] == spec["parallelism"]
    # The server refuses a policy for failed pods whose containers start again by themselves.
    assert pod["restartPolicy"] == "Never" and spec["podFailurePolicy"]["rules"]
    for rule in spec["podFailurePolicy"]["rules"]:
        assert rule["action"] in ("Ignore", "FailJob", "Count")
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In" and 0 not in rule["onExitCodes"]["values"]
    assert len(f"{job['metadata']['name']}-{spec['completions'] - 1}") <= 63
    config = next(each for each in objects if each["kind"] == "ConfigMap")
    assert {"configMap": {"name": config["metadata"]["name"]}, "name": "job"} in pod["volumes"]
    words = dict(word[2:].split("=", 1) for word in container["args"] if word.startswith("--") and "=" in word)
    assert (service is None) == (spec["completions"] == 1) == ("nnodes" not in words)
    if service is not None:
        name, (port,) = service["metadata"]["name"], service["spec"]["ports"]
        assert pod["subdomain"] == name
        assert words["rdzv-endpoint"] == f"{job['metadata']['name']}-0.{name}:{port['port']}"
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
        assert int(words["nnodes"]) == spec["completions"] and words["local-addr"] == "$(POD_IP)"
        assert "POD_IP" in {entry["name"] for entry in container["env"]}
        gpus = container["resources"].get("limits", {}).get("nvidia.com/gpu")
        assert gpus is None or int(words["nproc-per-node"]) <= gpus


def check_train_job(objects: list[Values]) -> None:
    """Raise if the parts of a TrainJob do not fit each other."""
    spec = objects[-1]["spec"]
    check_resources(spec["trainer"]["resourcesPerNode"])
    check_environment(spec["trainer"]["env"])
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]["spec"]["template"]
    check_metadata(template["metadata"])
    check_pod(template["spec"])
    # The names in Kubeflow's runtime `torch-distributed`. Its webhook refuses the environment of this container.
    assert replicated["name"] == template["spec"]["containers"][0]["name"] == "node"
    assert "env" not in template["spec"]["containers"][0]
    assert not any("rdzv" in word or "nnodes" in word for word in spec["trainer"]["args"])
    assert "gpu" not in str(spec["trainer"]["resourcesPerNode"]) or (
        spec["trainer"]["numProcPerNode"] <= spec["trainer"]["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    )
