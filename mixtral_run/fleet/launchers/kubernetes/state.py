"""State of a job in a cluster: its Job or TrainJob, and its pods, from the JSON of `kubectl get`. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixtral_run.fleet.jobs.job_spec import LABEL_JOB
from mixtral_run.fleet.untrusted import one_line, parse_json

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
ENDED = ("succeeded", "failed")


@dataclass(frozen=True)
class Pod:
    """A pod of a job.

    phase: of the API, in lower case. exit_code: of the container, if it has ended. waits_for: why the pod does not run.
    finished: time at which the container ended, ISO 8601, or "".
    """

    name: str
    index: int
    phase: str
    node: str = ""
    exit_code: int | None = None
    out_of_memory: bool = False
    waits_for: str = ""
    created: str = ""
    finished: str = ""

    @property
    def has_output(self) -> bool:
        return self.phase in ("running", *ENDED)

    @property
    def ended(self) -> bool:
        return self.phase in ENDED


@dataclass(frozen=True)
class Found:
    """A job as the cluster has it. state: suspended, pending, running, complete, failed or gone."""

    state: str
    reason: str = ""
    pods: tuple[Pod, ...] = ()

    @property
    def running(self) -> bool:
        return self.state in ("suspended", "pending", "running")

    @property
    def newest_pods(self) -> tuple[Pod, ...]:
        """The newest pod of each index, in their order. Earlier ones belong to earlier attempts."""
        newest = {pod.index: pod for pod in sorted(self.pods, key=lambda each: each.created)}
        return tuple(newest[index] for index in sorted(newest))

    @property
    def cause(self) -> Pod | None:
        """The pod whose failure ended the job: the first that failed, before those that a signal ended; or None."""
        bad = [pod for pod in self.newest_pods if pod.exit_code not in (None, 0)]
        return min(bad, key=lambda pod: (pod.exit_code in (130, 143), pod.finished), default=None)


def parse_found(text: str) -> dict[str, Found]:
    """Return the jobs in the output of `kubectl get jobs,pods --output json`, by name.

    Raises ValueError if it is not in the form of the API.
    """
    try:
        items = parse_json(text)["items"]
        pods: dict[str, list[Pod]] = {}
        jobs = {}
        for item in items:
            name = item["metadata"].get("labels", {}).get(LABEL_JOB)
            if item["kind"] == "Pod" and name is not None:
                pods.setdefault(name, []).append(_pod(item))
            elif item["kind"] in ("Job", "TrainJob") and item["metadata"]["name"] == name:
                jobs[name] = item
        names = dict.fromkeys([*jobs, *pods])
        return {name: _found(jobs.get(name), pods.get(name, [])) for name in names}
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"kubectl's answer is not in the form of the API: {error}") from error


def _found(job: Mapping[str, Any] | None, pods: list[Pod]) -> Found:
    listed = tuple(pods)
    if job is None:
        return Found("gone", "", listed)
    status, conditions = job.get("status") or {}, {}
    for each in status.get("conditions") or ():
        if each.get("status") == "True":
            conditions[each["type"]] = _why(each)
    for condition, state in (("Complete", "complete"), ("Failed", "failed")):
        if condition in conditions:
            return Found(state, conditions[condition] if state == "failed" else "", listed)
    if (job.get("spec") or {}).get("suspend"):
        return Found("suspended", "it waits for its queue, or was suspended by hand", listed)
    if any(pod.phase == "running" for pod in pods):
        return Found("running", "", listed)
    waiting = [f"{pod.name}: {pod.waits_for}" for pod in pods if pod.waits_for and not pod.ended]
    return Found("pending", waiting[0] if waiting else "", listed)


def _why(values: Mapping[str, Any]) -> str:
    parts = (values.get("reason"), values.get("message"))
    return one_line(": ".join(str(part) for part in parts if part))


def _pod(item: Mapping[str, Any]) -> Pod:
    metadata, status = item["metadata"], item.get("status") or {}
    containers: list[Any] = status.get("containerStatuses") or [{}]
    state = containers[0].get("state") or {}
    ended: dict[str, Any] = state.get("terminated") or {}
    waiting = state.get("waiting")
    scheduled = [each for each in status.get("conditions") or () if each.get("type") == "PodScheduled"]
    waits_for = _why(waiting) if waiting else ""
    if scheduled and scheduled[0].get("status") == "False":
        waits_for = _why(scheduled[0])
    index = metadata.get("labels", {}).get(INDEX_LABEL) or metadata.get("annotations", {}).get(INDEX_LABEL) or 0
    return Pod(
        name=str(metadata["name"]),
        index=int(index),
        phase=str(status.get("phase", "Pending")).lower(),
        node=str((item.get("spec") or {}).get("nodeName") or ""),
        exit_code=int(ended["exitCode"]) if ended else None,
        out_of_memory=ended.get("reason") == "OOMKilled",
        waits_for=waits_for,
        created=str(metadata.get("creationTimestamp") or ""),
        finished=str(ended.get("finishedAt") or ""),
    )


def places(pods: Iterable[Pod]) -> str:
    """Return the nodes of the pods, each once."""
    return ", ".join(dict.fromkeys(pod.node for pod in pods if pod.node))
