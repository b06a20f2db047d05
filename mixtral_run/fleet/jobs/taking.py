"""Who may start a job on a host: one job that uses the GPUs at a time, and none on a cordoned host.

The host decides, since several operators may start jobs at the same moment: the check and the start are one script
there, under a lock. Pure functions, apart from the script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.cordon import CORDON_FILE
from mixtral_run.fleet.jobs.host_facts import HostFacts
from mixtral_run.fleet.jobs.job_spec import LABEL_JOB, LABEL_VERB, JobSpec

NETWORK = "network"
"""What the containers of `status --network` are listed as. It is no verb of the command line."""
SHELL = "shell"
GPU_VERBS = (
    "finetune", "align", "pretrain", "generate", "chat", "evaluate", "serve", "smoke", "rehearse", NETWORK,
)  # fmt: skip
"""Verbs that use all GPUs of a host. The others (convert, verify, export) may run next to them. A shell starts on a
free host as well, and keeps others off it only while a process of it uses a GPU, which the host itself finds out."""
LOCK_FILE = "/tmp/mixtral-run.start.lock"
"""Lock of the host for the start of a job, in a folder that all users share. Each of them may lock what one created."""
BUSY, CORDONED = 75, 76
"""Exit codes of START_SCRIPT. `docker run --detach` ends with 125 to 127 if it fails."""
ANSWER_SECONDS = 20
"""Time that the driver and the engine get to answer about a shell, while other starts wait for the lock."""

START_SCRIPT = rf"""
holds_gpu() {{
  command -v nvidia-smi >/dev/null || return 1
  used=$(timeout -k 5 {ANSWER_SECONDS} nvidia-smi --query-compute-apps=pid --format=csv,noheader 9<&-) || return 0
  [ -n "$used" ] || return 1
  if printf '%s\n' "$used" | grep -qvE '^ *[0-9]*$'; then return 0; fi
  if ! inside=$(timeout -k 5 {ANSWER_SECONDS} $docker top "$1" -eo pid 9<&-); then
    shell=$(timeout -k 5 {ANSWER_SECONDS} $docker ps --quiet --filter "label={LABEL_JOB}=$1" 9<&-) || return 0
    [ -n "$shell" ]; return
  fi
  for pid in $used; do printf '%s\n' "$inside" | grep -qE "^ *$pid *$" && return 0; done
  return 1
}}
docker="$1"; cordon="$2"; lock="$3"; verbs="$4"; attached="$5"; mark="$6"; shift 6
[ -e "$lock" ] || (umask 022; set -C; : >"$lock") 2>/dev/null
if [ -L "$lock" ] || [ ! -f "$lock" ]; then
  echo "the lock of all starts is not a plain file; remove it: sudo rm -r $lock" >&2; exit 1
fi
exec 9<"$lock" || exit
flock -w 120 9 || {{ echo "another start of a job does not end" >&2; exit {BUSY}; }}
if [ -e "$cordon" ]; then [ -n "$attached" ] || head -c 4000 "$cordon" >&2; exit {CORDONED}; fi
if [ -n "$verbs" ]; then
  row='{{{{.Label "{LABEL_VERB}"}}}} {{{{.Label "{LABEL_JOB}"}}}}'
  rows=$($docker ps --filter label={LABEL_JOB} --format "$row") || exit
  busy=$(printf '%s\n' "$rows" | grep -E "^($verbs) " | head -n 1)
  for job in $(printf '%s\n' "$rows" | sed -n 's/^{SHELL} //p'); do
    if [ -z "$busy" ] && holds_gpu "$job" 2>/dev/null; then busy="{SHELL} $job"; fi
  done
  if [ -n "$busy" ]; then [ -n "$attached" ] || printf '%s\n' "$busy" >&2; exit {BUSY}; fi
fi
if [ -n "$attached" ]; then
  while [ -d /proc/$$ ] && [ -z "$($docker ps --quiet --filter "label={LABEL_JOB}=$attached")" ]; do sleep 0.2; done \
    </dev/null >/dev/null 2>&1 &
  exec 9<&-
  : >"$mark"
  exec "$@"
fi
"$@"
exit
"""
"""Script that starts a container unless the host is cordoned, or runs a job of one of the verbs or a shell that holds a
GPU. A shell whose processes cannot be compared with those on the GPUs counts as one that does, unless it has ended.

Arguments: the command for the engine; the record of a cordon; the lock; the verbs with bars between them, or nothing;
the name of a job whose container keeps the standard streams, or nothing; a file that is created just before such a
container starts, or nothing; and the command that starts the container. To open a FIFO would wait without an end.
The shell itself keeps the lock: sudo closes what it inherits. If the container keeps the streams, the command lasts as
long as the container: another process keeps the lock until the engine lists the container, and the script prints
nothing of its own.
"""


class OutputTakenError(ConfigError):
    """A job on a host writes to the output of this one. Another host may have no such job."""


class BusyError(HostError):
    """Hosts run jobs that use their GPUs. They may be free later. jobs: (name of the host, name of the job)."""

    jobs: tuple[tuple[str, str], ...] = ()


def start_argv(argv: Sequence[str], spec: JobSpec, facts: HostFacts, *, attached: bool = False) -> list[str]:
    """Return the command that starts a container (argv) on a host that is free. attached: it keeps the streams."""
    verbs = "|".join(GPU_VERBS) if needs_free_host(spec.verb, share=spec.options.share) else ""
    words = [" ".join(facts.docker), CORDON_FILE, LOCK_FILE, verbs]
    words += [spec.name, start_mark(spec, facts)] if attached else ["", ""]
    return ["sh", "-c", START_SCRIPT, "start", *words, *argv]


def start_mark(spec: JobSpec, facts: HostFacts) -> str:
    """Return the file on a host that shows that the script got as far as to start an attached container."""
    return f"{facts.folder}/{spec.name}/started"


def needs_free_host(verb: str, *, share: bool) -> bool:
    """Return True if a job does not start next to another one that uses the GPUs."""
    return (verb in GPU_VERBS or verb == SHELL) and not share


def busy_error(jobs: Sequence[tuple[str, str]], problems: Sequence[str] = ()) -> BusyError:
    """Return the error for hosts that run other jobs: (name of the host, name of the job)."""
    error = BusyError(
        "Another job uses the GPUs there.",
        problems=[*(f"{host}: {job} is running" for host, job in jobs), *problems],
        next_command="--on any, for a free host; --wait [TIME], to wait for its end; --share, to start next to it",
    )
    error.jobs = tuple(jobs)
    return error


def job_in(text: str) -> str:
    """Return the name of the job that START_SCRIPT reports, which comes from the host."""
    found = re.fullmatch(r"[a-z]+ ([A-Za-z0-9][A-Za-z0-9_.-]{0,127})", text.strip())
    return found[1] if found else "another job"
