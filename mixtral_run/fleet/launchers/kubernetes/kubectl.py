"""Calls of the installed kubectl. Pure functions build the argument lists; `Kubectl` starts the processes."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.ssh.connection import Answer
from mixtral_run.fleet.ssh.problems import last_line
from mixtral_run.fleet.ssh.streams import AnswerTooLongError, LastBytes, communicate, drained, lines, text_of

CALL_SECONDS = 60
FIELD_MANAGER = "mixtral-run"
"""Name under which the API records who set a field."""


@dataclass(frozen=True)
class Cluster:
    """A context and a namespace of kubectl; empty text is kubectl's own choice."""

    context: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        return ", ".join(
            f"{what} {name}" for what, name in (("context", self.context), ("namespace", self.namespace)) if name
        ) or "the cluster of kubectl"  # fmt: skip

    def argv(self, *words: str) -> list[str]:
        """Return a kubectl command for this context and namespace."""
        named = (("--context", self.context), ("--namespace", self.namespace))
        return ["kubectl", *(word for flag, value in named if value for word in (flag, value)), *words]


def apply_argv(cluster: Cluster) -> list[str]:
    """Return the command that creates or changes the objects on its standard input.

    On the server's side: an annotation with the whole manifest, which kubectl would add else, may not be larger than
    256 KiB.
    """
    options = ("--server-side", "--field-manager", FIELD_MANAGER, "--validate=strict", "--filename", "-")
    return cluster.argv("apply", *options)


def logs_argv(
    cluster: Cluster, pod: str, container: str, *, follow: bool = False, since: str = "", tail: int | None = None,
    stamps: bool = False,
) -> list[str]:  # fmt: skip
    """Return the command that prints the output of a container. since: a time stamp of the log."""
    options = ["--follow"] if follow else []
    options += ["--timestamps"] if stamps else []
    options += ["--since-time", since] if since else []
    options += ["--tail", str(tail)] if tail is not None else []
    return cluster.argv("logs", pod, "--container", container, *options)


class Kubectl:
    """The installed kubectl with one context and namespace. Safe to use from several threads."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def run(self, *words: str, stdin: str | None = None, timeout_seconds: float = CALL_SECONDS) -> Answer:
        """Run `kubectl WORDS` and return the answer. A timeout gives exit code 124."""
        return self._call(self.cluster.argv(*words), stdin, timeout_seconds)

    def check(self, what: str, *words: str, stdin: str | None = None, timeout_seconds: float = CALL_SECONDS) -> str:
        """Run `kubectl WORDS` and return its output. Raises HostError, which begins with `what`, if it fails."""
        answer = self.run(*words, stdin=stdin, timeout_seconds=timeout_seconds)
        if answer.exit_code:
            raise self.error(what, answer)
        return answer.output

    def apply(self, what: str, manifest: str) -> None:
        """Create the objects of a manifest. Raises HostError, which begins with `what`, if one is refused."""
        answer = self._call(apply_argv(self.cluster), manifest, CALL_SECONDS)
        if answer.exit_code:
            raise self.error(what, answer)

    def error(self, what: str, answer: Answer) -> HostError:
        """Return the error for a command that failed, in the words of kubectl."""
        problems = [line for line in answer.errors.splitlines() if line.strip()]
        return HostError(
            what,
            where=str(self.cluster),
            found=last_line(answer.errors) or f"exit code {answer.exit_code}",
            problems=problems if len(problems) > 1 else [],
            next_command=" ".join(self.cluster.argv("get", "events")),
        )

    @staticmethod
    def _call(argv: Sequence[str], stdin: str | None, timeout_seconds: float) -> Answer:
        process = _start(argv, stdin=stdin is not None)
        try:
            output, errors = communicate(process, None if stdin is None else stdin.encode(), timeout_seconds)
        except (subprocess.TimeoutExpired, AnswerTooLongError) as error:
            process.kill()
            process.wait()
            why = str(error) if isinstance(error, AnswerTooLongError) else f"no answer within {timeout_seconds:g} s"
            return Answer(124, "", why)
        except BaseException:
            process.kill()
            raise
        return Answer(process.returncode, text_of(output), text_of(errors))

    def stream(self, argv: Sequence[str], on_line: Callable[[str], None], stop: threading.Event) -> int:
        """Run a command, pass each line of its output to `on_line`, and return the exit code. `stop` ends it."""
        process = _start(argv, merge_errors=True)
        threading.Thread(target=_kill_when, args=(process, stop), daemon=True).start()
        assert process.stdout is not None
        try:
            for _, line in lines([process.stdout]):
                on_line(line)
            return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()

    @contextlib.contextmanager
    def receive(self, what: str, words: Sequence[str]) -> Iterator[IO[bytes]]:
        """Run `kubectl WORDS` and yield its standard output as a stream.

        Raises HostError, which begins with `what`, at the end of the context if the command failed, or sends more than
        was read. It explains a HostError that the context raised, and takes its place.
        """
        process = _start(self.cluster.argv(*words))
        assert process.stdout is not None and process.stderr is not None
        errors = LastBytes(process.stderr)
        problem: HostError | None = None
        try:
            yield process.stdout
        except HostError as error:
            problem = error
        except BaseException:
            process.kill()
            process.wait()
            raise
        if not drained(process.stdout):
            process.kill()
            process.wait()
            raise problem or HostError(what, where=str(self.cluster), found="more than was asked for")
        if process.wait():
            raise self.error(what, Answer(process.returncode, "", errors.text())) from problem
        if problem is not None:
            raise problem


def _start(argv: Sequence[str], *, stdin: bool = False, merge_errors: bool = False) -> subprocess.Popen[bytes]:
    try:
        # A session of its own: Ctrl-C in a terminal is for this process to decide on.
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if merge_errors else subprocess.PIPE,
            start_new_session=True,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise ConfigError(
            "kubectl cannot be run here.",
            expected="kubectl on the PATH, with a configuration for the cluster",
            found=error.strerror,
            next_command="https://kubernetes.io/docs/tasks/tools/; or --dry-run >job.yaml, and `kubectl apply "
            "--server-side --filename job.yaml` where there is one",
        ) from error


def _kill_when(process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(0.2):
            process.kill()
            return


def resolved(context: str | None, namespace: str | None) -> Cluster:
    """Return the cluster that kubectl would use now, so that a job is found again when the current context changes."""
    named = Cluster(context or "")
    kubectl = Kubectl(named)
    if context is None:
        # In a pod of a cluster kubectl has no configuration, and uses the service account.
        answer = kubectl.run("config", "current-context")
        named = Cluster(answer.output.strip() if answer.exit_code == 0 else "")
    if namespace is None:
        words = ("config", "view", "--minify", "--output", "jsonpath={..namespace}")
        answer = Kubectl(named).run(*words)
        namespace = answer.output.strip() if answer.exit_code == 0 else ""
    return Cluster(named.context, namespace)
