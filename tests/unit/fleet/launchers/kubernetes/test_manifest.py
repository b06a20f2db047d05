"""Manifests for Kubernetes, held against the schemas of its API and of Kubeflow Trainer."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ruamel.yaml import YAML

from mixtral_run.config.fields import Config
from mixtral_run.config.launchers.kubernetes import KubernetesConfig
from mixtral_run.config.verbs.generate import GenerateConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.config.verbs.weights import ConvertConfig
from mixtral_run.errors import ConfigError
from mixtral_run.fleet.jobs.job_spec import JobOptions, make_spec
from mixtral_run.fleet.launchers.kubernetes.manifest import manifest
from mixtral_run.fleet.launchers.kubernetes.yaml_text import to_yaml
from tests.unit.fleet.launchers.kubernetes.api_checks import check_job, check_object, check_train_job

IMAGE = "registry.example.com/mixtral-run:0.2.0"
CHECKPOINTS = "pvc/checkpoints:/checkpoints"
Values = dict[str, Any]


def finetune(**more: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"load": Path("mixtral"), "save": Path("adapter"), "mock_data": True, **more})


def settings(**more: Any) -> KubernetesConfig:
    return KubernetesConfig(**{"volume": (CHECKPOINTS,), **more}).check()


def objects(
    given: KubernetesConfig, config: Config | None = None, verb: str = "finetune", name: str = "finetune-1", **more: Any
) -> list[Values]:
    spec = make_spec(name, verb, config or finetune(), JobOptions(**{"image": IMAGE, **more}), given.nodes)
    return manifest(spec, given)


def problems(*arguments: Any, **more: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        objects(*arguments, **more)
    return str(refused.value)


FULL = {
    "volume": (CHECKPOINTS, "pvc/hf.cache:/huggingface", "/srv/data:/data:ro"),
    "namespace": "training",
    "service_account": "trainer",
    "pull_secret": "registry",
    "token_secret": "hf-token:value",
    "node_selector": ("gpu.example.com/model=h100", "zone="),
    "toleration": ("dedicated=training:NoSchedule", "spot"),
    "queue": "gpu-queue",
    "pod_memory": "900Gi",
    "pod_cpus": 64,
    "run_as": "2000:3000",
    "deadline_hours": 48.0,
}


@pytest.mark.parametrize("crd", ["job", "trainjob"])
@pytest.mark.parametrize(("nodes", "more"), [(1, {}), (2, FULL), (4, {"gpus_per_node": 0})])
def test_the_api_accepts_the_manifest(crd: str, nodes: int, more: Values) -> None:
    found = objects(settings(crd=crd, nodes=nodes, **more), nccl_debug="INFO", environment=("A=b $(POD_IP) $5",))
    for each in found:
        check_object(each)
    (check_job if crd == "job" else check_train_job)(found)
    assert [each["kind"] for each in found] == [
        "ConfigMap", *(["Service"] if crd == "job" and nodes > 1 else []), "Job" if crd == "job" else "TrainJob",
    ]  # fmt: skip


def _misspell(job: Values) -> None:
    job["spec"]["template"]["spec"]["containers"][0]["volumeMount"] = []


def _lose_a_mount(job: Values) -> None:
    job["spec"]["template"]["spec"]["volumes"].pop()


def _restart_in_place(job: Values) -> None:
    job["spec"]["template"]["spec"]["restartPolicy"] = "OnFailure"


@pytest.mark.parametrize("damage", [_misspell, _lose_a_mount, _restart_in_place])
def test_the_checks_find_what_the_server_would_refuse(damage: Callable[[Values], None]) -> None:
    found = copy.deepcopy(objects(settings()))
    damage(found[-1])
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check_object(found[-1])
        check_job(found)


def test_a_job_of_two_nodes() -> None:
    config, service, job = objects(settings(nodes=2, **FULL), max_restarts=3)
    assert json.loads(config["data"]["config.json"])["save"] == "/checkpoints/adapter"
    assert config["immutable"] is True
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert {each["metadata"]["namespace"] for each in (config, service, job)} == {"training"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-queue"
    assert job["metadata"]["annotations"]["org.mixtral-run.output"] == "/checkpoints/adapter"
    spec = job["spec"]
    assert (spec["suspend"], spec["completions"], spec["backoffLimit"]) == (True, 2, 6)
    assert (spec["activeDeadlineSeconds"], spec["ttlSecondsAfterFinished"]) == (172_800, 604_800)
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {
            "action": "FailJob",
            "onExitCodes": {"containerName": "trainer", "operator": "In", "values": [2, 3, 4, 5]},
        },
    ]
    pod = spec["template"]["spec"]
    assert (pod["serviceAccountName"], pod["imagePullSecrets"]) == ("trainer", [{"name": "registry"}])
    assert pod["nodeSelector"] == {"gpu.example.com/model": "h100", "zone": ""}
    assert pod["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "dedicated", "operator": "Equal", "value": "training", "effect": "NoSchedule"},
        {"key": "spot", "operator": "Exists"},
    ]
    assert (pod["terminationGracePeriodSeconds"], pod["automountServiceAccountToken"]) == (330, False)
    user = pod["securityContext"]
    assert (user["runAsUser"], user["runAsGroup"], user["fsGroup"]) == (2000, 3000, 3000)
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "mixtral_run.launch.torchrun"]
    assert container["args"] == [
        "--nnodes=2", "--nproc-per-node=8", "--rdzv-backend=c10d", "--rdzv-endpoint=finetune-1-0:29400",
        "--rdzv-id=finetune-1", "--rdzv-conf=join_timeout=1800,read_timeout=1800", "--local-addr=$(POD_IP)",
        "--max-restarts=0", "-m", "mixtral_run", "finetune", "--config", "/job/config.json",
    ]  # fmt: skip
    assert container["resources"] == {
        "limits": {"nvidia.com/gpu": 8, "memory": "900Gi"},
        "requests": {"nvidia.com/gpu": 8, "memory": "900Gi", "cpu": 64},
    }
    assert pod["volumes"] == [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}},
        {"name": "job", "configMap": {"name": "finetune-1"}},
        {"name": "kernels", "emptyDir": {}},
        {"name": "volume-1", "persistentVolumeClaim": {"claimName": "checkpoints"}},
        {"name": "volume-2", "persistentVolumeClaim": {"claimName": "hf.cache"}},
        {"name": "volume-3", "hostPath": {"path": "/srv/data", "type": "Directory"}},
    ]
    assert container["volumeMounts"][-1] == {"name": "volume-3", "mountPath": "/data", "readOnly": True}


def test_a_job_of_one_node_starts_the_verb_itself() -> None:
    container = objects(settings())[-1]["spec"]["template"]["spec"]["containers"][0]
    assert (container["command"], container["args"]) == (["mixtral-run"], ["finetune", "--config", "/job/config.json"])
    assert "readOnlyRootFilesystem" not in container["securityContext"]
    without = objects(settings(gpus_per_node=0))[-1]["spec"]["template"]["spec"]
    # NVIDIA's hooks fail in a read-only root; without GPUs there are none.
    assert without["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    assert "tolerations" not in without and without["containers"][0]["resources"] == {}
    assert {"/tmp", "/home/mixtral", "/huggingface"} <= {
        mount["mountPath"] for mount in without["containers"][0]["volumeMounts"]
    }


@pytest.mark.parametrize(("nodes", "restarts", "limit"), [(1, 0, 0), (1, 3, 3), (2, 3, 6), (4, 2, 8)])
def test_each_pod_of_an_incident_counts_against_the_limit(nodes: int, restarts: int, limit: int) -> None:
    assert objects(settings(nodes=nodes), max_restarts=restarts)[-1]["spec"]["backoffLimit"] == limit


@pytest.mark.parametrize("crd", ["job", "trainjob"])
def test_the_token_is_a_reference(crd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_never")
    text = to_yaml(objects(settings(crd=crd, token_secret="hf-token")))
    assert "hf_never" not in text
    job = list(yaml.safe_load_all(text))[-1]["spec"]
    variables = job["trainer"]["env"] if crd == "trainjob" else job["template"]["spec"]["containers"][0]["env"]
    (token,) = [each for each in variables if each["name"] == "HF_TOKEN"]
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf-token", "key": "token"}}}
    assert "inspect" in problems(settings(crd=crd), environment=("HF_TOKEN=hf_never",))


def test_copies_of_a_store_are_in_a_volume_and_do_not_end_with_the_pod() -> None:
    config = finetune(load=Path("s3://bucket/base"), save=Path("s3://bucket/run"))
    refused = problems(settings(), config)
    assert "--load: copies" in refused and "--save: copies" in refused and "/huggingface; expected" in refused
    scratch = "MIXTRAL_RUN_STORE_CACHE=/scratch/stores"
    assert "made in /scratch/stores" in problems(settings(), config, environment=(scratch,))
    assert "--save: copies" in problems(
        settings(volume=(CHECKPOINTS, "/s:/scratch:ro")), config, environment=(scratch,)
    )
    assert objects(settings(volume=(CHECKPOINTS, "pvc/hf:/huggingface")), config)
    assert objects(settings(), config, environment=("MIXTRAL_RUN_STORE_CACHE=/checkpoints/stores",))


@pytest.mark.parametrize("crd", ["job", "trainjob"])
def test_the_keys_of_a_store_are_references(crd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "neverInAManifest")
    text = to_yaml(objects(settings(crd=crd, store_secret="s3-keys")))
    assert "neverInAManifest" not in text
    job = list(yaml.safe_load_all(text))[-1]["spec"]
    variables = job["trainer"]["env"] if crd == "trainjob" else job["template"]["spec"]["containers"][0]["env"]
    found = {each["name"]: each["valueFrom"]["secretKeyRef"] for each in variables if each["name"].startswith("AWS_")}
    assert found == {
        "AWS_ACCESS_KEY_ID": {"name": "s3-keys", "key": "AWS_ACCESS_KEY_ID"},
        "AWS_SECRET_ACCESS_KEY": {"name": "s3-keys", "key": "AWS_SECRET_ACCESS_KEY"},
        "AWS_SESSION_TOKEN": {"name": "s3-keys", "key": "AWS_SESSION_TOKEN", "optional": True},
        "AWS_ENDPOINT_URL": {"name": "s3-keys", "key": "AWS_ENDPOINT_URL", "optional": True},
    }
    assert "store-secret" in problems(settings(crd=crd), environment=("AWS_ACCESS_KEY_ID=neverInAManifest",))


@pytest.mark.parametrize(
    ("shm", "quantity"), [("32g", "32Gi"), ("64G", "64Gi"), ("512mb", "512Mi"), ("900k", "900Ki"), ("4096", "4096")]
)
def test_shared_memory_in_the_words_of_the_api(shm: str, quantity: str) -> None:
    (found,) = [
        each for each in objects(settings(), shm_size=shm)[-1]["spec"]["template"]["spec"]["volumes"]
        if each["name"] == "shm"
    ]  # fmt: skip
    assert found["emptyDir"]["sizeLimit"] == quantity


def test_local_files_travel_in_the_config_map(tmp_path: Path) -> None:
    text, table = tmp_path / "mine.jsonl", tmp_path / "mine.parquet"
    text.write_text('{"messages": "ü"}\r\n', newline="")
    table.write_bytes(b"PAR1\xff\x00")
    config = finetune(mock_data=False, data_path=(str(text), str(table)))
    (found, *_) = objects(settings(), config)
    check_object(found)
    assert found["data"]["data_path-001.jsonl"] == '{"messages": "ü"}\r\n'
    assert base64.b64decode(found["binaryData"]["data_path-002.parquet"]) == b"PAR1\xff\x00"
    table.write_bytes(b"\xff" * 800_000)  # below a megabyte, and above one as base64
    text.write_bytes(b"a" * 1_100_000)
    answer = problems(settings(), config)
    assert "mine.jsonl: it has 1,100,000 bytes" in answer and "mine.parquet: it has 1,066,668 bytes" in answer
    assert "copy it to a volume" in answer


def test_paths_that_no_volume_holds_are_refused_together() -> None:
    config = finetune(load=Path("/models/mixtral"), save=Path("/data/out"), mock_data=False, data_path=("/sets/a:2",))
    answer = problems(settings(volume=(CHECKPOINTS, "/srv:/data:ro")), config)
    assert "--load: no --volume has /models/mixtral; add one, such as pvc/NAME:/models" in answer
    assert "--data-path: no --volume has /sets/a" in answer
    assert "--save: /data/out is written to; found a volume that is only read, at /data" in answer
    held = ("pvc/models:/models/mixtral:ro", "pvc/sets:/sets:ro", "pvc/data:/data")
    objects(settings(volume=(CHECKPOINTS, *held)), config)
    # The writers of the kit rename a folder into place, which needs the folder above it.
    assert "--save: expected a path below the volume" in problems(
        settings(volume=(CHECKPOINTS, "pvc/out:/data/out", *held[:2])), config
    )


def test_a_deeper_volume_decides() -> None:
    volume = (CHECKPOINTS, "pvc/data:/data:ro", "pvc/out:/data/out")
    objects(settings(volume=volume), finetune(save=Path("/data/out/adapter")))
    assert "--save" in problems(settings(volume=volume), finetune(save=Path("/data/outer/adapter")))


@pytest.mark.parametrize("path", ["/job", "/job/x", "/usr/local", "/usr", "/dev", "/dev/shm", "/tmp", "/kernels"])
def test_a_volume_does_not_hide_the_image(path: str) -> None:
    assert f"--volume: {path} of the container would hide" in problems(settings(volume=(CHECKPOINTS, f"pvc/x:{path}")))


def test_what_cannot_work_is_refused_before_the_cluster_sees_it() -> None:
    assert "docker push it" in problems(settings(), image="mixtral-run:local")
    assert "at most the 4 GPUs of a pod; found 8" in problems(settings(gpus_per_node=4), finetune(nproc_per_node=8))
    assert "more than --shm-size" in problems(settings(pod_memory="32Gi"))
    assert "/huggingface is written to" in problems(settings(volume=(CHECKPOINTS, "pvc/hf:/huggingface:ro")))
    # A TrainJob leaves restarts to its runtime.
    answer = problems(settings(crd="trainjob", runtime="mine"), max_restarts=2)
    assert "--max-restarts" in answer and "failurePolicy of the JobSet in mine" in answer
    for name in ("Finetune_1", "f" * 53, "-f", ""):
        assert "the job's name" in problems(settings(), name=name)


def test_other_verbs_run_alike() -> None:
    convert = ConvertConfig(hf_model_path="mistralai/Mixtral-8x7B-v0.1", output_path=Path("mixtral"))
    found = objects(settings(gpus_per_node=0), convert, "convert", "convert-1")
    check_job(found)
    assert found[-1]["spec"]["template"]["spec"]["containers"][0]["args"][0] == "convert"
    generate = GenerateConfig(load=Path("mixtral"), prompt=("What?",))
    check_job(objects(settings(nodes=2), generate, "generate", "generate-1"))


HOSTILE = (
    "1e3", "0o17", "0x1f", "1_000", "y", "No", "null", "~", "", " a", "- a", "a: b", "#c", "*a", "&a", "!!python/x y",
    "'", '"', "\\", "{a", "%x", "@x", "`x`", "|", ">", "é\u2028\u2029", "\u0085", "\ufeff", "\t", "tab\tand\nline ",
    "\n", "a\nb\u0085c\n", "a\n---\nkind: Secret\n", "a\r\nb\r\n", "2026-11-30", "12:30:45", ".5", "+1", "<<", "=",
    "yes: no",
)  # fmt: skip


def test_no_text_changes_its_meaning_in_yaml() -> None:
    values = {"texts": list(HOSTILE), **{f"key-{number}": text for number, text in enumerate(HOSTILE)}}
    text = to_yaml([values, {"kind": "second"}])
    reader = YAML(typ="safe", pure=True)  # YAML 1.2, whose numbers are others than those of PyYAML
    for read in (list(yaml.safe_load_all(text)), list(reader.load_all(text))):
        assert read == [values, {"kind": "second"}]


def test_a_hostile_value_stays_inside_its_field() -> None:
    hostile = 'x"\n---\nkind: Secret\nmetadata: {name: stolen}\n#'
    found = objects(settings(), finetune(load=Path(f"/checkpoints/{hostile}")), environment=(f"A={hostile}",))
    read = list(yaml.safe_load_all(to_yaml(found)))
    assert read == found and [each["kind"] for each in read] == ["ConfigMap", "Job"]
    (variable,) = [
        each for each in read[-1]["spec"]["template"]["spec"]["containers"][0]["env"] if each["name"] == "A"
    ]  # fmt: skip
    assert variable["value"] == hostile
