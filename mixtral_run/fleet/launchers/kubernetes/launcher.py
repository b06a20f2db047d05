"""The launcher for Kubernetes: applies the manifest of a job, and asks the cluster about it with kubectl."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeGuard

from mixtral_run.config.fields import Config
from mixtral_run.config.launchers.kubernetes import KubernetesConfig
from mixtral_run.config.verbs.training import RunConfig
from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.jobs.fetch import fetch
from mixtral_run.fleet.jobs.job_spec import LABEL_JOB, STOP_SECONDS, JobSpec, make_spec
from mixtral_run.fleet.jobs.jobs import KILLED, SIGNALLED
from mixtral_run.fleet.launchers.kubernetes.follow import POLL_SECONDS, PodFollower
from mixtral_run.fleet.launchers.kubernetes.kubectl import Cluster, Kubectl, logs_argv, resolved
from mixtral_run.fleet.launchers.kubernetes.manifest import NODE, manifest
from mixtral_run.fleet.launchers.kubernetes.pod import READER, reader_pod
from mixtral_run.fleet.launchers.kubernetes.state import Found, Pod, parse_found, places
from mixtral_run.fleet.launchers.kubernetes.yaml_text import to_yaml
from mixtral_run.fleet.launchers.launcher import JobState, LaunchRequest, Say
from mixtral_run.fleet.launchers.records import JobRecord

KINDS = {"job": "jobs.batch", "trainjob": "trainjobs.trainer.kubeflow.org"}
"""Names of the kinds for kubectl, with the group, which tells them from other kinds of the same name."""
READY_SECONDS = 300
OWN = "configmaps,services"
"""Kinds of the other objects of a job."""


class KubernetesLauncher:
    """Kubernetes, through kubectl."""

    not_used = frozenset(
        ("on", "inventory", "ulimits", "checkpoints_folder", "hf_home", "rendezvous_address")
    )  # fmt: skip

    def render(self, request: LaunchRequest) -> str:
        return to_yaml(manifest(*_job_of(request)))

    def submit(self, request: LaunchRequest, say: Say) -> JobRecord:
        spec, settings = _job_of(request)
        objects = manifest(spec, settings)
        cluster = resolved(settings.kube_context, settings.namespace)
        kubectl, name, kind = Kubectl(cluster), spec.name, KINDS[settings.crd]
        if _saves(request.config) and request.config.resume is None:
            say("--resume auto: a pod that the cluster replaces continues from the newest checkpoint in --save")
        try:
            kubectl.apply(f"{name} was not accepted.", to_yaml(objects))
        except BaseException:
            # The objects before the refused one exist.
            kubectl.run("delete", f"{kind},{OWN}", "--selector", f"{LABEL_JOB}={name}", "--ignore-not-found")
            raise
        _give_away(kubectl, kind, objects, say)
        return JobRecord(
            name=name,
            launcher="kubernetes",
            verb=spec.verb,
            scheduler_id=f"{settings.crd}/{name}",
            output=spec.output or "",
            submitted=time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
            extra={
                "context": cluster.context,
                "namespace": cluster.namespace,
                "crd": settings.crd,
                "container": "trainer" if settings.crd == "job" else NODE,
                "num_nodes": str(settings.nodes),
                "reader": json.dumps(reader_pod(spec, settings)),
            },
        )

    def follow(self, record: JobRecord, say: Say) -> None:
        kubectl = _kubectl(record)
        PodFollower(kubectl, record, lambda: _look(kubectl, record), say).follow()

    def states(self, records: Sequence[JobRecord]) -> list[JobState]:
        groups: dict[tuple[str, str, str], list[JobRecord]] = {}
        for record in records:
            key = (record.extra["context"], record.extra["namespace"], record.extra["crd"])
            groups.setdefault(key, []).append(record)
        found: dict[str, JobState] = {}
        errors: list[HostError] = []
        for (context, namespace, crd), members in groups.items():
            selector = f"{LABEL_JOB}={members[0].name}" if len(members) == 1 else LABEL_JOB
            try:
                seen = _jobs(Kubectl(Cluster(context, namespace)), crd, selector)
            except HostError as error:
                errors.append(error)
                # One cluster that is gone does not hide the jobs of the others.
                reason = error.found or error.what
                found |= {
                    each.name: JobState(record=each, state="unknown", running=True, reason=reason) for each in members
                }
                continue
            found |= {each.name: _state(each, seen.get(each.name, Found("gone"))) for each in members}
        if errors and len(errors) == len(groups):
            raise errors[0]
        return [found[record.name] for record in records]

    def print_log(self, record: JobRecord, tail: int | None) -> None:
        kubectl = _kubectl(record)
        pods = [pod for pod in _look(kubectl, record).newest_pods if pod.has_output]
        if not pods:
            raise ConfigError(
                f"{record.name} has no output in the cluster: no pod of it has run yet, or its pods were removed.",
                where=str(kubectl.cluster),
                next_command=f"mixtral-run logs -f {record.name}, which waits; or mixtral-run jobs",
            )
        for pod in pods:
            prefix = f"{pod.index} | " if record.extra["num_nodes"] != "1" else ""
            words = logs_argv(kubectl.cluster, pod.name, record.extra["container"], tail=tail)
            code = kubectl.stream(words, partial(_print, prefix), threading.Event())
            if code:
                raise HostError(
                    f"The output of {pod.name} cannot be read.", where=str(kubectl.cluster), found=f"exit code {code}"
                )

    def stop(self, record: JobRecord, say: Say) -> None:
        kubectl, name = _kubectl(record), record.name
        found = _look(kubectl, record)
        if not found.running:
            say(f"{name} has already ended.")
            return
        say(f"Asking {name} to save and end …")
        # The pods are removed with the job, so that their last lines and exit codes are seen now or never.
        last = _LastLook(kubectl, record, found, say)
        kind = KINDS[record.extra["crd"]]
        seconds = STOP_SECONDS + 60
        try:
            kubectl.check(
                f"{name} has not ended.",
                "delete", f"{kind}/{name}", "--cascade=foreground", "--wait=true", f"--timeout={seconds}s",
                "--ignore-not-found=true",
                timeout_seconds=seconds + 30,
            )  # fmt: skip
        finally:
            ended = last.finish()
        kubectl.run("delete", OWN, "--selector", f"{LABEL_JOB}={name}", "--ignore-not-found=true")
        problems = []
        for pod in ended:
            if pod.exit_code is None:
                say(f"{pod.name} has ended; its exit code is not known: its last lines say whether it saved")
            elif pod.exit_code in (0, *SIGNALLED):
                say(f"✓ {pod.name} has ended (exit code {pod.exit_code})")
            else:
                killed = "it did not end in time and was killed; unsaved work is lost"
                why = killed if pod.exit_code == KILLED else "its output says whether it saved"
                problems.append(f"{pod.name}: exit code {pod.exit_code}; {why}")
        if problems:
            raise HostError(f"{name} has ended, but not cleanly.", problems=problems)
        say(f"✓ {name} is removed from the cluster; what it saved is in {record.output or 'no file'}")

    def fetch(self, record: JobRecord, target: Path, overwrite: bool, say: Say) -> Path:
        kubectl = _kubectl(record)
        pod = json.loads(record.extra["reader"])
        if any("hostPath" in volume for volume in pod["spec"]["volumes"]):
            # A folder of the nodes is another one on each node. The first pod of the job wrote the output.
            seen = [each for each in _look(kubectl, record).newest_pods if each.node]
            if not seen:
                raise ConfigError(
                    f"The node that has the output of {record.name} is not known: its pods are gone.",
                    where=record.output,
                    next_command="mixtral-run fetch NODE:/FOLDER, over SSH",
                )
            pod["spec"]["nodeName"] = seen[0].node
        name = pod["metadata"]["name"]
        what = f"The output of {record.name} could not be read."
        say(f"Starting the pod {name}, which reads the volume …")
        try:
            kubectl.apply(what, to_yaml([pod]))
            words = ("wait", f"pod/{name}", "--for=condition=Ready", f"--timeout={READY_SECONDS}s")
            kubectl.check(what, *words, timeout_seconds=READY_SECONDS + 30)
            return fetch(Host(name, name), record.output, target, _PodSource(kubectl, name), overwrite, say)
        finally:
            kubectl.run("delete", f"pod/{name}", "--wait=false", "--ignore-not-found=true")


@dataclass(frozen=True)
class _PodSource:
    """A pod from which `fetch` reads."""

    kubectl: Kubectl
    pod: str

    def receive(self, host: Host, command: Sequence[str]) -> AbstractContextManager[IO[bytes]]:
        words = ("exec", self.pod, "--container", READER, "--", *command)
        return self.kubectl.receive(f"{host.name} did not send what was asked for.", words)


class _LastLook:
    """Output and exit codes of the pods of a job while the job is being removed."""

    def __init__(self, kubectl: Kubectl, record: JobRecord, found: Found, say: Say) -> None:
        self._kubectl, self._record = kubectl, record
        self._pods = {pod.name: pod for pod in found.pods if not pod.ended and pod.has_output}
        self._follower = PodFollower(kubectl, record, lambda: found, say)
        self._follower.print_new(tuple(self._pods.values()), new_only=True)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(POLL_SECONDS / 3):
            try:
                found = _look(self._kubectl, self._record)
            except HostError:
                continue
            self._pods |= {pod.name: pod for pod in found.pods if pod.name in self._pods}
            self._follower.print_new(tuple(self._pods.values()))

    def finish(self) -> list[Pod]:
        """Return the pods as they were seen last."""
        self._over.set()
        self._thread.join(60)
        self._follower.finish(POLL_SECONDS * 2)
        return list(self._pods.values())


def _saves(config: Config) -> TypeGuard[RunConfig]:
    """Return True for the settings of a training that saves checkpoints."""
    return isinstance(config, RunConfig) and config.save is not None


def _job_of(request: LaunchRequest) -> tuple[JobSpec, KubernetesConfig]:
    settings, config = request.settings, request.config
    assert isinstance(settings, KubernetesConfig)
    if _saves(config) and config.resume is None:
        # A pod that is replaced, after a drain of its node or a failure, finds the checkpoints of the one before it.
        config = replace(config, resume="auto")
    return make_spec(request.name, request.verb, config, request.options, settings.nodes), settings


def _give_away(kubectl: Kubectl, kind: str, objects: Sequence[Mapping[str, Any]], say: Say) -> None:
    """Make the Job the owner of its other objects, so that the cluster removes them with it."""
    job = objects[-1]
    name = job["metadata"]["name"]
    answer = kubectl.run("get", f"{kind}/{name}", "--output", "jsonpath={.metadata.uid}")
    uid = answer.output.strip()
    if answer.exit_code == 0 and re.fullmatch(r"[0-9A-Za-z-]{1,64}", uid):
        owner = {"apiVersion": job["apiVersion"], "kind": job["kind"], "name": name, "uid": uid}
        try:
            kubectl.apply("", to_yaml(owned(objects[:-1], owner)))
            return
        except HostError:
            pass
    say(
        f"! the settings of {name} stay in the cluster after the job: kubectl delete configmap,service "
        f"--selector {LABEL_JOB}={name}"
    )


def owned(objects: Sequence[Mapping[str, Any]], owner: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return objects with an owner, with which the cluster removes them."""
    return [{**each, "metadata": {**each["metadata"], "ownerReferences": [dict(owner)]}} for each in objects]


def _cluster(record: JobRecord) -> Cluster:
    return Cluster(record.extra["context"], record.extra["namespace"])


def _kubectl(record: JobRecord) -> Kubectl:
    return Kubectl(_cluster(record))


def _look(kubectl: Kubectl, record: JobRecord) -> Found:
    found = _jobs(kubectl, record.extra["crd"], f"{LABEL_JOB}={record.name}")
    return found.get(record.name, Found("gone"))


def _jobs(kubectl: Kubectl, crd: str, selector: str) -> dict[str, Found]:
    text = kubectl.check(
        "The cluster does not report its jobs.", "get", f"{KINDS[crd]},pods", "--selector", selector, "--output", "json"
    )
    try:
        return parse_found(text)
    except ValueError as error:
        raise HostError(
            "The cluster reports its jobs in an unexpected form.", where=str(kubectl.cluster), found=str(error)
        ) from error


def _state(record: JobRecord, found: Found) -> JobState:
    cause = found.cause
    code = 0 if found.state == "complete" else cause.exit_code if cause is not None else None
    return JobState(
        record=record, state=found.state, running=found.running, exit_code=None if found.running else code,
        reason=found.reason, place=places(found.newest_pods),
    )  # fmt: skip


def _print(prefix: str, text: str) -> None:
    print("\n".join(prefix + part for part in text.split("\n")), file=sys.stdout, flush=True)
