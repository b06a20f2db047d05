"""`fetch` of a job on Kubernetes with a STAND-IN for kubectl (tests/support/servers/standin_kubectl.py)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mixtral_run.config.launchers.kubernetes import KubernetesConfig
from mixtral_run.config.verbs.training import FinetuneConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.jobs.job_spec import JobOptions, make_spec
from mixtral_run.fleet.launchers.kubernetes.pod import reader_pod
from mixtral_run.fleet.launchers.records import write_record
from tests.support.servers.standin_kubectl import ended, job, pod
from tests.unit.fleet.launchers.kubernetes.api_checks import check_object, check_pod
from tests.unit.fleet.launchers.kubernetes.standin_cluster import IMAGE, StandIn, record, run


def reader(*volumes: str) -> str:
    config = FinetuneConfig(load=Path("base"), save=Path("adapter"), mock_data=True)
    spec = make_spec("finetune-1", "finetune", config, JobOptions(image=IMAGE), 1)
    pod = reader_pod(spec, KubernetesConfig(volume=("pvc/checkpoints:/checkpoints", *volumes), run_as="7:8"))
    check_object(pod)
    check_pod(pod["spec"])
    return json.dumps(pod)


def test_fetch_reads_through_a_pod_of_its_own(cluster: StandIn, tmp_path: Path) -> None:
    saved = record()
    write_record(dataclasses.replace(saved, extra={**saved.extra, "reader": reader()}))
    output = cluster.folder / "volumes/checkpoints/adapter"
    output.mkdir(parents=True)
    (output / "adapter.bin").write_bytes(b"\x00weights")
    cluster.steps([job(ended("Complete")), pod("a-0", "Succeeded", code=0)])
    run("fetch", "finetune-1", str(tmp_path))
    assert (tmp_path / "adapter/adapter.bin").read_bytes() == b"\x00weights"
    (((applied,)),) = cluster.applied
    assert applied["spec"]["volumes"] == [{"name": "volume-1", "persistentVolumeClaim": {"claimName": "checkpoints"}}]
    assert applied["spec"]["containers"][0]["volumeMounts"] == [
        {"name": "volume-1", "mountPath": "/checkpoints", "readOnly": True}
    ]
    words = [call[4] for call in cluster.calls]
    assert words == ["get", "apply", "wait", "exec", "delete"]
    # What is not there is reported in the words of tar, and the pod is removed as well.
    write_record(dataclasses.replace(saved, extra={**saved.extra, "reader": reader()}, output="/checkpoints/gone"))
    with pytest.raises(HostError, match="Cannot stat"):
        run("fetch", "finetune-1", str(tmp_path))
    assert cluster.calls[-1][4:] == ["delete", "pod/finetune-1-fetch", "--wait=false", "--ignore-not-found=true"]


def test_fetch_from_a_folder_of_the_nodes_needs_the_node(cluster: StandIn, tmp_path: Path) -> None:
    saved = record()
    write_record(dataclasses.replace(saved, extra={**saved.extra, "reader": reader("/srv/data:/data")}))
    cluster.steps([])
    with pytest.raises(ConfigError, match="its pods are gone"):
        run("fetch", "finetune-1", str(tmp_path))
    cluster.steps([job(ended("Complete")), pod("a-0", "Succeeded", code=0)])
    cluster.settings(refused={"wait": "error: timed out waiting for the condition"})
    with pytest.raises(HostError, match="could not be read"):
        run("fetch", "finetune-1", str(tmp_path))
    assert cluster.applied[0][0]["spec"]["nodeName"] == "node-0"
    assert cluster.calls[-1][4] == "delete"
