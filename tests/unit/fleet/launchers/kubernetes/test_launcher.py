"""`--launcher kubernetes`, `jobs`, `logs` and `stop` with a STAND-IN for kubectl (servers/standin_kubectl.py)."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixtral_run.errors import ConfigError, HostError, MixtralRunError, Stopped, TrainingError
from mixtral_run.fleet.launchers.kubernetes import follow
from mixtral_run.fleet.launchers.kubernetes.follow import PodFollower
from mixtral_run.fleet.launchers.kubernetes.kubectl import Cluster, Kubectl, apply_argv, logs_argv
from mixtral_run.fleet.launchers.kubernetes.launcher import KubernetesLauncher
from mixtral_run.fleet.launchers.kubernetes.state import Found, parse_found
from mixtral_run.fleet.launchers.records import read_records
from tests.support.servers.standin_kubectl import ended, job, pod
from tests.unit.fleet.launchers.kubernetes.api_checks import check_job, check_object, check_train_job
from tests.unit.fleet.launchers.kubernetes.standin_cluster import LAUNCH, StandIn, line, record, run


def test_the_words_of_kubectl() -> None:
    here = Cluster("dev", "team")
    assert apply_argv(here) == [
        "kubectl", "--context", "dev", "--namespace", "team", "apply", "--server-side", "--field-manager",
        "mixtral-run", "--validate=strict", "--filename", "-",
    ]  # fmt: skip
    assert logs_argv(Cluster(), "p", "trainer", tail=3) == [
        "kubectl",
        "logs",
        "p",
        "--container",
        "trainer",
        "--tail",
        "3",
    ]
    assert logs_argv(Cluster(), "p", "node", follow=True, since="2026-01-01T00:00:00Z", stamps=True) == [
        "kubectl", "logs", "p", "--container", "node", "--follow", "--timestamps", "--since-time",
        "2026-01-01T00:00:00Z",
    ]  # fmt: skip


def test_a_dry_run_prints_the_manifest_and_calls_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    run(*LAUNCH, "--dry-run", "--nodes", "2", "--namespace", "team")
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [each["kind"] for each in documents] == ["ConfigMap", "Service", "Job"]
    run(*LAUNCH, "--dry-run", "--crd", "trainjob")
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [each["kind"] for each in documents] == ["ConfigMap", "TrainJob"]
    # A pod may be replaced at any time: the new one goes on.
    assert json.loads(documents[0]["data"]["config.json"])["resume"] == "auto"
    run(*LAUNCH, "--dry-run", "--resume")
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    assert json.loads(documents[0]["data"]["config.json"])["resume"] == "yes"


def test_without_kubectl_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="kubectl cannot be run here") as caught:
        run(*LAUNCH)
    assert "--dry-run" in str(caught.value) and read_records() == []


def test_a_job_is_applied_followed_and_recorded(cluster: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = pod("a-0", "Pending", unscheduled="0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
    cluster.steps(
        [job(suspend=True)],
        [job(), waiting],
        [job(), pod("a-0", "Running")],
        [job(), pod("a-0", "Running")],
        [job(ended("Complete")), pod("a-0", "Succeeded", code=0)],
    )
    lines = line(1, "iteration 1"), line(1, "iteration 1"), line(2, "\x1b[2Jiteration 2"), line(3, "done")
    cluster.output("a-0", *lines, lost_after=2)
    run(*LAUNCH, "--token-secret", "hf")
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["iteration 1", "iteration 1", "iteration 2", "done"]
    assert "is suspended: it waits for its queue" in shown.err
    assert shown.err.count("3 Insufficient nvidia.com/gpu") == 1
    assert "--resume auto" in shown.err and "is done" in shown.err
    (objects, owned) = cluster.applied
    assert [each["kind"] for each in objects] == ["ConfigMap", "Job"]
    owner = owned[0]["metadata"]["ownerReferences"]
    name = objects[-1]["metadata"]["name"]
    assert owner == [
        {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": "5f0f63a4-0000-4000-8000-000000000000"}
    ]
    assert {**owned[0], "metadata": objects[0]["metadata"]} == objects[0]
    (written,) = read_records()
    assert (written.name, written.scheduler_id, written.output) == (name, f"job/{name}", "/checkpoints/adapter")
    # What kubectl would choose now is recorded, so that the job is found when its choice changes.
    assert (written.extra["context"], written.extra["namespace"]) == ("here", "training")
    assert all(call[:4] == ["--context", "here", "--namespace", "training"] for call in cluster.calls[2:])


def test_a_refused_job_leaves_nothing(cluster: StandIn) -> None:
    refusal = 'Error from server (Forbidden): jobs.batch is forbidden: exceeded quota "gpus"'
    cluster.settings(refused={"apply": refusal})
    with pytest.raises(HostError, match="was not accepted") as caught:
        run(*LAUNCH, "--crd", "trainjob", "--detach")
    assert "exceeded quota" in str(caught.value)
    assert cluster.calls[-1][4:7] == ["delete", "trainjobs.trainer.kubeflow.org,configmaps,services", "--selector"]
    assert re.fullmatch(r"org\.mixtral-run\.job=finetune-\d{4}-\d{6}-[0-9a-f]{4}", cluster.calls[-1][7])
    assert read_records() == []


class Silent(Kubectl):
    """A kubectl whose pods print nothing. It starts no process."""

    def stream(self, *_: object) -> int:
        return 0


def found_in(items: list[dict[str, Any]]) -> Found:
    text = json.dumps({"items": items}).replace("NAME", "finetune-1")
    return parse_found(text).get("finetune-1", Found("gone"))


@pytest.mark.parametrize(
    ("steps", "kind", "words"),
    [
        ([job(ended("Failed", "PodFailurePolicy")), pod("a-0", "Failed", code=2)], ConfigError, "exit code 2"),
        ([job(ended("Failed")), pod("a-0", "Failed", code=1, reason="OOMKilled")], TrainingError, "memory"),
        ([job(ended("Failed")), pod("a-0", "Failed", code=143)], Stopped, "was stopped"),
        ([job(ended("Failed", "DeadlineExceeded", "too long"))], HostError, "DeadlineExceeded: too long"),
        ([], HostError, "was removed from the cluster"),
        (
            # The first failure is the cause; earlier attempts are not looked at.
            [
                job(ended("Failed", "BackoffLimitExceeded")),
                pod("a-0-old", "Failed", code=5, finished="2026-01-01T00:01:00Z"),
                pod("a-0", "Failed", code=1, finished="2026-01-01T00:20:05Z", created="2026-01-01T00:15:00Z"),
                pod("a-1", "Failed", 1, code=6, finished="2026-01-01T00:20:00Z", created="2026-01-01T00:15:00Z"),
            ],
            TrainingError,
            "a-1 on node-1",
        ),
    ],
)  # fmt: skip
def test_the_end_of_a_job_is_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    steps: list[dict[str, Any]],
    kind: type[MixtralRunError],
    words: str,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    found = found_in(steps)
    with pytest.raises(kind, match=re.escape(words)) as caught:
        PodFollower(Silent(Cluster("here")), record(), lambda: found, print).follow()
    assert type(caught.value) is kind


def test_two_pods_are_told_apart_and_later_attempts_are_followed(
    cluster: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    record(nodes=2)
    first = [pod("a-0", "Failed", code=1), pod("a-1", "Failed", 1, code=1)]
    later = {"created": "2026-01-01T01:00:00Z"}
    cluster.steps(
        [job(), pod("a-0", "Running"), pod("a-1", "Running", 1)],
        [job(), *first, pod("b-0", "Running", **later), pod("b-1", "Pending", 1, **later)],
        [job(ended("Complete")), *first, pod("b-0", "Succeeded", code=0), pod("b-1", "Succeeded", 1, code=0)],
    )
    for name in ("a-0", "a-1", "b-0", "b-1"):
        cluster.output(name, line(1, f"from {name}"))
    run("logs", "-f", "finetune-1")
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "0 | from a-0", "0 | from b-0", "1 | from a-1", "1 | from b-1"
    ]  # fmt: skip


def test_a_cluster_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(follow, "POLL_SECONDS", 0.001)
    answers: list[Found | HostError] = [HostError("No answer."), HostError("No answer."), Found("complete")]
    said: list[str] = []

    def look() -> Found:
        answer = answers.pop(0)
        if isinstance(answer, HostError):
            raise answer
        return answer

    PodFollower(Silent(Cluster()), record(), look, said.append).follow()
    assert said == [
        "! No answer. finetune-1 may continue; retrying for 10 minutes", "The cluster answers again"
    ]  # fmt: skip
    answers.append(HostError("Still none."))
    monkeypatch.setattr(follow, "PATIENCE_SECONDS", 0.0)
    with pytest.raises(HostError, match="Still none"):
        PodFollower(Silent(Cluster()), record(), look, said.append).follow()


def test_logs_without_follow(cluster: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    record(nodes=2)
    cluster.steps([job(), pod("a-0", "Running"), pod("a-1", "Pending", 1)])
    cluster.output("a-0", line(1, "one"), line(2, "two"))
    run("logs", "finetune-1", "--tail", "1")
    assert capsys.readouterr().out == "0 | two\n"
    cluster.steps([job(), pod("a-0", "Pending")])
    with pytest.raises(ConfigError, match="no output in the cluster"):
        run("logs", "finetune-1")


def test_jobs_lists_the_states(cluster: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    record()
    cluster.steps([job(ended("Failed", "BackoffLimitExceeded")), pod("a-0", "Failed", code=1)])
    run("jobs")
    shown = capsys.readouterr().out
    assert "kubernetes job/finetune-1" in shown and "node-0" in shown
    assert "failed (1): BackoffLimitExceeded" in shown
    record("finetune-2", crd="trainjob")
    cluster.steps([job(kind="TrainJob"), pod("a-0", "Running")])
    run("jobs", "--running")
    assert "trainjob/finetune-2" in capsys.readouterr().out
    assert [call[5] for call in cluster.calls[-2:]] == ["jobs.batch,pods", "trainjobs.trainer.kubeflow.org,pods"]


def test_stop_shows_the_last_lines_and_the_exit_code(cluster: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    record()
    running = [job(), pod("a-0", "Running")]
    cluster.steps(running, running, [job(), pod("a-0", "Failed", code=143)], [], stay=True)
    cluster.output("a-0", line(1, "iteration 7"))
    run("stop", "finetune-1")
    shown = capsys.readouterr().out
    assert "✓ a-0 has ended" in shown or "its exit code is not known" in shown
    assert "is removed from the cluster; what it saved is in /checkpoints/adapter" in shown
    deletes = [call[4:] for call in cluster.calls if call[4] == "delete"]
    assert deletes == [
        ["delete", "jobs.batch/finetune-1", "--cascade=foreground", "--wait=true", "--timeout=390s",
         "--ignore-not-found=true"],
        ["delete", "configmaps,services", "--selector", "org.mixtral-run.job=finetune-1", "--ignore-not-found=true"],
    ]  # fmt: skip
    cluster.steps([job(ended("Complete"))])
    run("stop", "finetune-1")
    assert "has already ended" in capsys.readouterr().out
    cluster.steps(running, stay=True)
    cluster.settings(refused={"delete": "error: timed out waiting for the condition on jobs/finetune-1"})
    with pytest.raises(HostError, match="has not ended"):
        run("stop", "finetune-1")


def test_what_kubernetes_does_not_use_is_refused(cluster: StandIn) -> None:
    with pytest.raises(ConfigError) as caught:
        run(*LAUNCH, "--ulimit", "none", "--hf-home", "/x", "--rendezvous-address", "10.0.0.1")
    assert [line.partition(":")[0] for line in caught.value.problems] == [
        "--ulimit", "--hf-home", "--rendezvous-address"
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--volume: --launcher slurm does not use it"):
        run(*LAUNCH, "--launcher", "slurm")
    assert cluster.calls == []


def test_an_answer_in_another_form_is_an_error() -> None:
    for odd in ([{"kind": "Pod"}], [{"kind": "Job", "metadata": None}], ["x"], [pod("a", "Running", index="x")]):
        with pytest.raises(ValueError):
            found_in(odd)
    assert found_in([job(), {"kind": "Event", "metadata": {}}]).state == "pending"


def test_states_of_one_cluster_do_not_hide_those_of_another(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))

    def check(self: Kubectl, what: str, *words: str, **_: object) -> str:
        if self.cluster.context == "gone":
            raise HostError(what, found="context was not found")
        return json.dumps({"items": [job(), pod("a-0", "Running")]}).replace("NAME", "finetune-1")

    monkeypatch.setattr(Kubectl, "check", check)
    records = [record("finetune-1"), record("finetune-2", context="gone")]
    found = KubernetesLauncher().states(records)
    assert [(each.state, each.running, each.reason) for each in found] == [
        ("running", True, ""), ("unknown", True, "context was not found")
    ]  # fmt: skip
    with pytest.raises(HostError, match="context was not found"):
        KubernetesLauncher().states(records[1:])


def test_the_commands_of_the_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[5] / "docs/kubernetes.md").read_text()
    (settings,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "cluster.yaml").write_text(settings)
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    mixtral-run (.*--launcher kubernetes .*)$", text, re.MULTILINE)
    kinds = []
    for command in commands:
        run(*shlex.split(command), "--dry-run")
        objects = list(yaml.safe_load_all(capsys.readouterr().out))
        for each in objects:
            check_object(each)
        kinds.append(objects[-1]["kind"])
        (check_train_job if kinds[-1] == "TrainJob" else check_job)(objects)
        assert "hf-token" in str(objects[-1]) and objects[-1]["metadata"]["namespace"] == "training"
    assert kinds == ["Job", "Job", "TrainJob"]
