"""Bootstrap of hosts: first contact with each host, then the playbook on all hosts that answer, with live progress."""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import quote

from mixtral_run.config.fields import SETTINGS_ERROR
from mixtral_run.config.home_folder import expanded
from mixtral_run.errors import ConfigError, HostError, MixtralRunError
from mixtral_run.fleet.bootstrap.host_lock import Held, hold_locks
from mixtral_run.fleet.bootstrap.progress import FleetProgress, Notice
from mixtral_run.fleet.bootstrap.view import make_view, summary
from mixtral_run.fleet.explain.explain import record_failures
from mixtral_run.fleet.host_folders import DEFAULT_FOLDERS
from mixtral_run.fleet.hosts import FOLDER_VARIABLES, Host, find_hosts, remember_hosts
from mixtral_run.fleet.plays.provisioning import playbook, role_names
from mixtral_run.fleet.plays.role_variables import refuse_misspelled, values_of
from mixtral_run.fleet.plays.runner import Play, PlayEnd, RunningPlay, forget_old_plays, parse_extra_vars
from mixtral_run.fleet.plays.vault import next_for_vault
from mixtral_run.fleet.secrets import keys_problem, token_problem
from mixtral_run.fleet.selection import hosts_of, inventory_of, refuse_lost_variables
from mixtral_run.fleet.ssh.connection import Ssh, connection_options
from mixtral_run.fleet.ssh.problems import connection_error
from mixtral_run.fleet.state import read_json, state_folder, write_json
from mixtral_run.run_lock import all_of

CANCEL_SECONDS = 1.0
DEFAULT_FORKS = 50
KEEP_CONNECTION = ("-o", "ControlMaster=auto", "-o", "ControlPersist=300s", "-o", "ServerAliveCountMax=8")
"""The same options as in ansible.cfg for manual plays. They come first: ssh uses the first value of an option."""
ROLE_OF_SECRETS = ROLE_OF_FOLDERS = "hf_cache"
RETRY_COMMAND = "mixtral-run bootstrap --retry"


@dataclass(frozen=True, kw_only=True)
class BootstrapRequest:
    """Settings of a bootstrap. All of them except passwords are recorded for --retry."""

    hosts: tuple[str, ...] = ()
    inventory: Path | None = None
    limit: str | None = None
    check: bool = False
    diff: bool = False
    tags: tuple[str, ...] = ()
    extra_vars: tuple[str, ...] = ()
    forks: int = DEFAULT_FORKS
    serial: str | None = None
    hf_token_file: Path | None = None
    store_keys_file: Path | None = None
    ask_become_pass: bool = False
    accept_new_host_key: tuple[str, ...] = ()
    become_password: str | None = field(default=None, repr=False)
    login_password: str | None = field(default=None, repr=False)

    def again_with(self, given: Mapping[str, Any]) -> BootstrapRequest:
        """Return these settings with the given ones replaced. Extra variables are appended to the existing ones."""
        more = {name: value for name, value in given.items() if value}
        if "tags" in more and ROLE_OF_SECRETS not in more["tags"]:
            # They were for a role that this bootstrap leaves out.
            more = {"hf_token_file": None, "store_keys_file": None, **more}
        more["extra_vars"] = (*self.extra_vars, *given.get("extra_vars", ()))
        return dataclasses.replace(self, **more)

    def to_record(self) -> dict[str, Any]:
        """Return JSON values for --retry, without passwords and options for one use."""
        values = dataclasses.asdict(self)
        for name in ("become_password", "login_password", "accept_new_host_key"):
            del values[name]
        # --retry may be called from another folder.
        if self.hf_token_file is not None and self.hf_token_file.parent == state_folder("tmp"):
            del values["hf_token_file"]  # the token was typed in; its file is removed afterwards
        values["extra_vars"] = [f"@{_absolute(word[1:])}" if word.startswith("@") else word for word in self.extra_vars]
        return {name: _absolute(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_record(cls, values: Mapping[str, Any]) -> BootstrapRequest:
        """Return the settings that `to_record` gave."""
        known = {item.name for item in dataclasses.fields(cls)} & values.keys()
        found: dict[str, Any] = {}
        for name in known:
            value = values[name]
            found[name] = tuple(value) if isinstance(value, list) else value
            if name in ("inventory", "hf_token_file", "store_keys_file") and value:
                found[name] = Path(value)
        return cls(**found)


def _absolute(path: str | Path) -> str:
    return str(expanded(path).resolve())


@dataclass(frozen=True)
class BootstrapEnd:
    """Result of a bootstrap. `text` is the summary for the terminal."""

    progress: FleetProgress
    interrupted: bool
    text: str

    def raise_if_bad(self) -> None:
        """Raise HostError if a host was not set up, KeyboardInterrupt if the user interrupted the bootstrap."""
        if self.interrupted:
            raise KeyboardInterrupt
        bad = self.progress.bad
        if bad:
            count = f"{len(bad)} of {len(self.progress.hosts)} hosts" if len(self.progress.hosts) > 1 else bad[0].name
            raise HostError(f"{count} could not be set up; the table and the messages show what to do.")


def bootstrap(
    request: BootstrapRequest, stream: TextIO | None = None, starter: Callable[[Play], RunningPlay] = RunningPlay
) -> BootstrapEnd:
    """Set up hosts and show the progress. A host that fails does not affect the others.

    Raises ConfigError for invalid settings before anything starts, MixtralRunError if Ansible cannot start.
    """
    stream = stream or sys.stdout
    began = time.monotonic()
    _check_request(request)
    request = _with_own_inventory(request)
    if request.inventory is None:
        refuse_misspelled(request.extra_vars)
    hosts = hosts_of(request.hosts, request.inventory, request.limit)
    accepted = _accepted(request, hosts)
    with _one_bootstrap(request, hosts):
        return _set_up(request, hosts, accepted, stream, starter, began)


@contextmanager
def _one_bootstrap(request: BootstrapRequest, hosts: tuple[Host, ...]) -> Iterator[None]:
    """Hold a lock of each host on this machine, unless nothing is changed. Raises ConfigError with all holders."""
    if request.check:
        yield
        return
    folder = state_folder("locks")
    locks = [(host.name, folder / f"{quote(host.inventory_name, safe='')}.lock") for host in hosts]
    with all_of(locks, "mixtral-run bootstrap", "Another bootstrap sets up some of these hosts."):
        yield


def _set_up(
    request: BootstrapRequest,
    hosts: tuple[Host, ...],
    accepted: tuple[Host, ...],
    stream: TextIO,
    starter: Callable[[Play], RunningPlay],
    began: float,
) -> BootstrapEnd:
    ssh = Ssh()
    progress = FleetProgress({host.inventory_name: host.name for host in hosts})
    print(f"Connecting to {len(hosts)} host{'s' if len(hosts) != 1 else ''} …", file=stream, flush=True)
    problems = dict(
        zip(hosts, ssh.each(hosts, lambda host: _first_contact(ssh, host, request, host in accepted)), strict=True)
    )
    notices = [progress.unreachable(host.inventory_name, str(problem)) for host, problem in problems.items() if problem]
    reachable = tuple(host for host in hosts if problems[host] is None)
    remember_hosts(_with_folders(reachable, request.extra_vars) if _sets_folders(request) else reachable)
    end, interrupted = None, False
    # --check changes nothing.
    with hold_locks(ssh, () if request.check else reachable, "mixtral-run bootstrap") as locks:
        notices += [progress.unreachable(host.inventory_name, str(each)) for host, each in locks.problems.items()]
        notices += [Notice(host.name, "warning", text) for host, text in locks.notes.items()]
        free = tuple(host for host in reachable if host not in locks.problems)
        if free:
            running = starter(_play(request, free, ssh, locks))
            end, interrupted = show_play(running, progress, stream, request.diff, notices)
        for host, each in locks.lost.items():
            progress.lost_lock(host.inventory_name, str(each))
    if end is None and notices:
        with make_view(progress, stream) as view:
            view.update(notices)
    forget_old_plays()
    text = _record_and_summarize(request, progress, end, time.monotonic() - began, interrupted)
    return BootstrapEnd(progress, interrupted, text)


def _with_own_inventory(request: BootstrapRequest) -> BootstrapRequest:
    """Return the request with the inventory of remembered hosts, which holds their variables and SSH settings."""
    if request.inventory is not None:
        return request
    hosts = hosts_of(request.hosts, None, request.limit)
    refuse_lost_variables(hosts)
    names = tuple(host.name for host in hosts)
    inventory = inventory_of(hosts)
    return request if inventory is None else dataclasses.replace(request, hosts=names, inventory=inventory, limit=None)


def _check_request(request: BootstrapRequest) -> None:
    problems = []
    parse_extra_vars(request.extra_vars)
    secrets = (
        ("--hf-token-file", request.hf_token_file, token_problem),
        ("--store-keys-file", request.store_keys_file, keys_problem),
    )
    for flag, file, problem_of in secrets:
        if file is None:
            continue
        if (problem := problem_of(expanded(file))) is not None:
            problems.append(f"{flag} {file}: {problem}")
        if request.tags and ROLE_OF_SECRETS not in request.tags:
            problems.append(f"{flag}: expected {ROLE_OF_SECRETS} among --tags, the role that writes it to the hosts")
    roles = role_names()
    unknown = [tag for tag in request.tags if tag not in (*roles, "always")]
    if unknown:
        # Ansible would skip all roles and report success.
        problems.append(f"--tags: expected some of {', '.join(roles)}; found {', '.join(unknown)}")
    if request.serial and not re.fullmatch(r"[1-9]\d*%?", request.serial):
        problems.append(f"--serial: expected a number of hosts, or N%; found {request.serial}")
    if request.forks < 1:
        problems.append(f"--forks: expected at least 1; found {request.forks}")
    if problems:
        raise ConfigError(SETTINGS_ERROR, problems=problems)


def _sets_folders(request: BootstrapRequest) -> bool:
    """Return True if the role runs that creates the folders of jobs."""
    return not request.check and (not request.tags or ROLE_OF_FOLDERS in request.tags)


def _with_folders(hosts: Sequence[Host], extra_vars: Sequence[str]) -> list[Host]:
    """Return the hosts with the folders that this bootstrap gives them: of --extra-vars, inventory or defaults."""
    given = values_of(extra_vars)
    defaults = {"hf_cache_checkpoint_folder": DEFAULT_FOLDERS.checkpoints, "hf_cache_home": DEFAULT_FOLDERS.hf_home}
    return [
        host.with_folders(
            {
                name: given.get(name) or (getattr(host, field) if host.inventory else None) or defaults[name]
                for field, name in FOLDER_VARIABLES.items()
            }
        )
        for host in hosts
    ]


def _accepted(request: BootstrapRequest, hosts: tuple[Host, ...]) -> tuple[Host, ...]:
    named = find_hosts(request.accept_new_host_key, hosts)
    strangers = [host.name for host in named if host not in hosts]
    if strangers:
        raise ConfigError(
            "--accept-new-host-key names hosts that this bootstrap does not set up.",
            expected=f"some of {', '.join(host.name for host in hosts)}",
            found=", ".join(strangers),
        )
    return named


def _first_contact(ssh: Ssh, host: Host, request: BootstrapRequest, accept_new_key: bool) -> HostError | None:
    """Return why a host cannot be used, or None. Records its host key; with a password, installs the user's key."""
    try:
        if accept_new_key:
            ssh.accept_new_key(host)
        answer = ssh.run(host, ["true"], timeout_seconds=45)
        if answer.exit_code == 0:
            return None
        error = connection_error(host, answer.errors)
        if request.login_password is not None and "refuses the key" in error.what:
            ssh.install_key(host, request.login_password)
            ssh.check(host, ["true"])
            return None
    except HostError as problem:
        return problem
    return error


def _play(request: BootstrapRequest, hosts: tuple[Host, ...], ssh: Ssh, locks: Held) -> Play:
    variables: dict[str, Any] = dict(locks.variables)
    if request.hf_token_file is not None:
        variables["hf_cache_token_file"] = _absolute(request.hf_token_file)
    if request.store_keys_file is not None:
        variables["hf_cache_store_keys_file"] = _absolute(request.store_keys_file)
    forks = min(request.forks, len(hosts))
    if request.serial:
        # Ansible's own serial starts no further batch after all hosts of one batch have failed.
        variables["mixtral_strategy"] = "host_pinned"
        forks = min(forks, _hosts_at_once(request.serial, len(hosts)))
    return Play(
        playbook=playbook("bootstrap"),
        hosts=hosts,
        inventory=request.inventory,
        variables=variables,
        extra_vars=request.extra_vars,
        tags=request.tags,
        check=request.check,
        diff=request.diff,
        forks=forks,
        ssh_args=(*KEEP_CONNECTION, *connection_options(ssh.known_hosts)),
        become_password=request.become_password,
    )


def _hosts_at_once(serial: str, num_hosts: int) -> int:
    return max(1, num_hosts * int(serial[:-1]) // 100) if serial.endswith("%") else int(serial)


def show_play(
    running: RunningPlay, progress: FleetProgress, stream: TextIO, diff: bool, notices: list[Any]
) -> tuple[PlayEnd, bool]:
    """Run a play to its end and show it. Return its end and whether the user interrupted it.

    Raises MixtralRunError if Ansible could not run the playbook to its end.
    """
    interrupted = False
    with make_view(progress, stream, diff) as view:
        view.update(notices)
        try:
            for event in running.events():
                view.update(progress.fold(event) if event is not None else ())
        except KeyboardInterrupt:
            interrupted = True
            running.cancel()
            progress.stop()
    end = running.wait(CANCEL_SECONDS if interrupted else None)
    if progress.play_error or (not progress.finished and not interrupted):
        found = (progress.play_error or end.output or f"exit code {end.exit_code}").strip()
        raise MixtralRunError(
            "Ansible could not run the playbook to its end.",
            found=found[-1500:],
            where=str(end.artifacts / "stdout"),
            next_command=next_for_vault(found),
        )
    return end, interrupted


def _record_and_summarize(
    request: BootstrapRequest, progress: FleetProgress, end: PlayEnd | None, seconds: float, interrupted: bool
) -> str:
    bad = [host.name for host in progress.bad]
    record_failures({host.name: host.failure.message for host in progress.bad if host.failure})
    # --check changes nothing, so the hosts to retry stay the same.
    if bad and not request.check:
        record = dataclasses.replace(request, limit=",".join(bad)).to_record()
        write_json(_retry_file(), record)
    elif not request.check:
        _retry_file().unlink(missing_ok=True)
    text = summary(
        progress,
        seconds=seconds,
        log=end.artifacts / "stdout" if end else None,
        retry=RETRY_COMMAND if bad and not request.check else None,
        check=request.check,
    )
    if interrupted:
        text += "\nStopped. A task that had started may run a moment longer. The same command continues from there."
    return text


def _retry_file() -> Path:
    return state_folder() / "retry.json"


def last_request() -> BootstrapRequest:
    """Return the settings of the last bootstrap, limited to its failed hosts. Raises ConfigError if none failed."""
    record = read_json(_retry_file(), None)
    if not isinstance(record, dict):
        raise ConfigError("There is nothing to retry: no host failed in the last bootstrap.")
    return BootstrapRequest.from_record(record)
