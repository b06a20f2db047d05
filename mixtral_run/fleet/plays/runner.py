"""Runs of playbooks with ansible-runner. No other module imports it."""

from __future__ import annotations

import json
import os
import queue
import re
import shlex
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixtral_run.config.home_folder import expanded
from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.fleet.hosts import GROUP, Host, inventory_names, unresolved_variables
from mixtral_run.fleet.plays import control_sockets
from mixtral_run.fleet.plays.provisioning import provisioning_folder
from mixtral_run.fleet.plays.vault import next_for_vault, vault_settings
from mixtral_run.fleet.state import state_folder, write_json, write_private
from mixtral_run.fleet.untrusted import printable

POLL_SECONDS = 0.2
"""Interval in which ansible-runner checks for cancellation. With its default of 5 s, Ctrl-C is slow."""
KEPT_PLAYS = 50

KEPT_VARIABLES = re.compile(
    r"(ANSIBLE|AWX|RUNNER|SSH|LC|XDG|PYTHON|KRB5)_?\w*$|(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|SHELL|TERM|TMPDIR|TZ|VIRTUAL_ENV)$"
    r"|(https?|no|all)_proxy$",
    re.IGNORECASE,
)
"""Environment variables that Ansible needs. All others, such as HF_TOKEN, stay out of its artifacts."""

HAND_ON = (
    "import json, os, sys; file, *words = sys.argv[1:]; os.environ.update(json.load(open(file))); os.unlink(file); "
    "os.execvp(words[0], words)"
)
"""Program that starts another one with additional variables from a file, and removes the file."""

BECOME_PROMPT = r"BECOME password[^:]*:\s*?$"


@dataclass(frozen=True, kw_only=True)
class Play:
    """A run of a playbook on hosts."""

    playbook: Path
    hosts: tuple[Host, ...]
    inventory: Path | None = None
    """Inventory of the user, or None. The play is limited to `hosts`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Variables from the kit. The user's extra variables override them."""
    extra_vars: tuple[str, ...] = ()
    """Arguments in the form of `ansible-playbook --extra-vars`."""
    tags: tuple[str, ...] = ()
    check: bool = False
    diff: bool = False
    forks: int = 50
    ssh_args: tuple[str, ...] = ()
    become_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PlayEnd:
    """Result of a play."""

    status: str
    """Status from ansible-runner: successful, failed, canceled or timeout."""
    exit_code: int
    artifacts: Path
    """Folder with the complete output (`stdout`) and the events of the play."""
    output: str


def arguments(play: Play, variables_file: Path, extra_files: Sequence[Path]) -> list[str]:
    """Return the arguments of ansible-playbook after inventory and playbook. They contain no secret."""
    found = ["--forks", str(play.forks), "--extra-vars", f"@{variables_file}"]
    for file in extra_files:
        found += ["--extra-vars", f"@{file}"]
    if play.inventory is not None:
        found += ["--limit", ",".join(host.inventory_name for host in play.hosts)]
    if play.tags:
        found += ["--tags", ",".join(play.tags)]
    if play.check:
        found.append("--check")
    if play.diff:
        found.append("--diff")
    if play.become_password is not None:
        found.append("--ask-become-pass")
    return found


def environment(play: Play) -> dict[str, str]:
    """Return Ansible's settings as environment variables. They are written to the artifacts: no secret is allowed."""
    return {
        "ANSIBLE_CONFIG": str(provisioning_folder() / "ansible.cfg"),
        # ansible_ssh_common_args of an inventory (a jump host, for example) would replace ANSIBLE_SSH_COMMON_ARGS.
        # ANSIBLE_SSH_ARGS come first on ssh's command line, and ssh uses the first value of an option.
        "ANSIBLE_SSH_ARGS": shlex.join(play.ssh_args),
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        # Ansible's debug output shows the arguments of modules, secrets included, and would be in the artifacts.
        "ANSIBLE_DEBUG": "False",
        "ANSIBLE_DEPRECATION_WARNINGS": "False",
        "ANSIBLE_FORCE_COLOR": "False",
        "ANSIBLE_NOCOLOR": "True",
        # The Ansible of this Python environment, even if its folder is not on PATH (pipx).
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        **control_sockets.settings(),
        **vault_settings(),
    }


def parse_extra_vars(words: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """Return the files (`@FILE`) and values (`name=value …`, JSON or YAML) of --extra-vars.

    Raises ConfigError with all problems.
    """
    import yaml

    files: list[Path] = []
    values: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        if word.startswith("@"):
            file = expanded(word[1:]).resolve()
            files.append(file)
            problems += [] if file.is_file() else [f"{word}: there is no such file"]
        elif word.lstrip().startswith(("{", "[")):
            try:
                found = yaml.safe_load(word)
            except yaml.YAMLError as error:
                problems.append(f"{word}: {str(error).splitlines()[0]}")
                continue
            if isinstance(found, dict):
                values |= found
            else:
                problems.append(f"{word}: expected an object")
        else:
            try:
                pairs = [piece.partition("=") for piece in shlex.split(word)]
            except ValueError as error:
                problems.append(f"{word}: {error}")
                continue
            problems += [f"{name}: expected name=value" for name, equals, _ in pairs if not equals or not name]
            values |= {name: value for name, equals, value in pairs if equals}
    if problems:
        raise ConfigError("--extra-vars cannot be understood.", expected="name=value, {…} or @FILE", problems=problems)
    return files, values


def read_inventory(path: Path) -> dict[str, Any]:
    """Return the output of `ansible-inventory --list`: groups, and `_meta.hostvars`. Raises ConfigError.

    Templates in connection variables are resolved.
    """
    import ansible_runner

    if not path.exists():
        raise ConfigError(
            "There is no such inventory.",
            where=str(path),
            next_command="name hosts instead: mixtral-run … ubuntu@gpu-01",
        )
    settings = environment(Play(playbook=path, hosts=()))
    with _own_folder("inventory") as folder, _search_path(settings["PATH"]):
        output, errors = ansible_runner.get_inventory(
            "list", [str(path.resolve())], quiet=True, private_data_dir=str(folder), envvars=settings
        )
    try:
        found: dict[str, Any] = json.loads(output)
    except ValueError as error:
        reported = (errors or output).strip()
        raise ConfigError(
            "The inventory cannot be read.",
            where=str(path),
            found=reported[-500:],
            next_command=next_for_vault(reported),
        ) from error
    if "Failed to parse" in (errors or "") or not inventory_names(found):
        raise ConfigError("The inventory names no host.", where=str(path), found=(errors or "no host").strip()[-500:])
    _resolve_variables(path, found)
    return found


def _resolve_variables(path: Path, listing: dict[str, Any]) -> None:
    """Replace templates in connection variables by their values. ansible-inventory does not resolve them."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for host, names in unresolved_variables(listing).items():
        alike.setdefault(names, []).append(host)
    problems: list[str] = []
    for names, hosts in alike.items():
        for host, found in _resolved(path, hosts, names).items():
            if isinstance(found, str):
                problems.append(f"{host}: {', '.join(names)}: {found}")
            else:
                listing["_meta"]["hostvars"][host].update(found)
    if problems:
        raise ConfigError(
            "Connection variables of the inventory cannot be resolved.",
            where=str(path),
            problems=problems,
            next_command=next_for_vault("\n".join(problems)),
        )


def _resolved(path: Path, hosts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any] | str]:
    """Return, by host, the variables as Ansible resolves them, or Ansible's error. Opens no connection."""
    import ansible_runner

    settings = environment(Play(playbook=path, hosts=()))
    with _own_folder("inventory") as folder, _search_path(settings["PATH"]):
        end = ansible_runner.interface.run(
            private_data_dir=str(folder),
            inventory=str(path.resolve()),
            host_pattern=",".join(hosts),
            module="ansible.builtin.debug",
            module_args=json.dumps({"msg": {name: f"{{{{ {name} }}}}" for name in names}}),
            envvars=settings,
            quiet=True,
        )
        events = [event for event in end.events if event["event"] in ("runner_on_ok", "runner_on_failed")]
        output = printable(end.stdout.read()).strip()[-300:]
    results = {event["event_data"]["host"]: event["event_data"]["res"].get("msg") for event in events}
    return {host: results.get(host) or output for host in hosts}


def list_tasks(playbook: Path) -> list[str]:
    """Return `role · task` for each task of a playbook, in order. Opens no connection."""
    import ansible_runner

    settings = environment(Play(playbook=playbook, hosts=()))
    words = [str(playbook), "--inventory", "localhost,", "--list-tasks"]
    with _own_folder("list") as folder, _search_path(settings["PATH"]):
        output, _, _ = ansible_runner.run_command(
            "ansible-playbook", words, quiet=True, private_data_dir=str(folder), envvars=settings
        )
    lines = [line.strip() for line in printable(output).splitlines() if "TAGS:" in line]
    # The checks of argument_specs at the start of each role are left out.
    shown = [line for line in lines if not line.startswith("play ") and "Validating arguments" not in line]
    return [line.split("TAGS:")[0].strip().replace(" : ", " · ") for line in shown]


@contextmanager
def _search_path(value: str) -> Iterator[None]:
    """Set PATH of this process, where ansible-runner looks for Ansible's programs."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ["PATH"]
        else:
            os.environ["PATH"] = before


@contextmanager
def _own_folder(name: str) -> Iterator[Path]:
    """Yield a private folder that is removed afterwards."""
    path = state_folder("tmp", f"{name}-{uuid.uuid4().hex[:8]}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class RunningPlay:
    """A play in its own thread. Iterate over `events()`. Any thread may call `cancel()`."""

    def __init__(self, play: Play) -> None:
        import ansible_runner

        self.play = play
        self.ident = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
        self.folder = state_folder("plays", self.ident)
        state_folder("plays", self.ident, "artifacts")  # ansible-runner would create it readable for everyone
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._cancelled = threading.Event()
        self._problem: BaseException | None = None
        self._runner = ansible_runner.interface.init_runner(
            private_data_dir=str(self.folder),
            ident="run",
            playbook=str(play.playbook),
            inventory=str(self._inventory()),
            cmdline=shlex.join(self._arguments()),
            envvars=environment(play),
            passwords={BECOME_PROMPT: play.become_password} if play.become_password is not None else None,
            suppress_env_files=True,
            quiet=True,
            event_handler=self._on_event,
            cancel_callback=self._cancelled.is_set,
        )
        # ansible-runner passes on the whole environment of this process and writes it to the artifacts.
        self._runner.config.env = {
            name: value for name, value in self._runner.config.env.items() if KEPT_VARIABLES.match(name)
        }
        self._thread = threading.Thread(target=self._run, name="play", daemon=True)

    @property
    def artifacts(self) -> Path:
        """Folder with the output and the events."""
        return self.folder / "artifacts" / "run"

    def events(self, interval_seconds: float = 0.2) -> Iterator[dict[str, Any] | None]:
        """Start the play and yield its events; yield None after each interval without an event. Ends with the play."""
        self._thread.start()
        while True:
            try:
                event = self._events.get(timeout=interval_seconds)
            except queue.Empty:
                yield None
                continue
            if event is None:
                return
            yield event

    def cancel(self) -> None:
        """Kill Ansible. A task that had started on a host may run a moment longer."""
        self._cancelled.set()

    def wait(self, seconds: float | None = None) -> PlayEnd:
        """Wait for the end of the play, for at most `seconds`. Raises MixtralRunError if Ansible could not be run."""
        self._thread.join(seconds)
        if self._problem is not None:
            raise MixtralRunError(
                "Ansible could not be run.", found=str(self._problem), where=str(self.artifacts)
            ) from self._problem
        output = self.artifacts / "stdout"
        return PlayEnd(
            status="canceled" if self._cancelled.is_set() else str(self._runner.status),
            exit_code=254 if self._runner.rc is None else int(self._runner.rc),
            artifacts=self.artifacts,
            output=printable(output.read_text(encoding="utf-8", errors="replace")) if output.exists() else "",
        )

    def _run(self) -> None:
        rest = self.folder / "env" / "rest"
        try:
            if self.play.inventory is not None:
                # An inventory plugin for a cloud needs its credentials from the environment. In the environment of the
                # runner they would be written to the artifacts.
                kept = self._runner.config.env
                more = {name: value for name, value in os.environ.items() if name not in kept}
                write_private(rest, json.dumps(more))
                words = [sys.executable, "-IS", "-c", HAND_ON, str(rest)]
                self._runner.config.command = [*words, *self._runner.config.command]
            self._runner.run()
        except BaseException as error:
            self._problem = error
        finally:
            rest.unlink(missing_ok=True)
            self._events.put(None)

    def _on_event(self, event: dict[str, Any]) -> bool:
        self._events.put(event)
        return True

    def _inventory(self) -> Path:
        if self.play.inventory is not None:
            return self.play.inventory.resolve()
        path = self.folder / "hosts.json"
        hosts = {host.inventory_name: host.ansible_variables() for host in self.play.hosts}
        write_json(path, {GROUP: {"hosts": hosts}})
        # Ansible reads a .json file as YAML, of which JSON is a subset.
        return path

    def _arguments(self) -> list[str]:
        # With suppress_env_files, ansible-runner reads its settings only from this file.
        (self.folder / "env").mkdir(mode=0o700)
        write_json(self.folder / "env" / "settings", {"pexpect_timeout": POLL_SECONDS, "suppress_ansible_output": True})
        files, values = parse_extra_vars(self.play.extra_vars)
        variables = self.folder / "variables.json"
        write_json(variables, dict(self.play.variables))
        if values:
            extra = self.folder / "extra_vars.json"
            write_json(extra, values)
            files.append(extra)
        return arguments(self.play, variables, files)


def forget_old_plays() -> None:
    """Remove the artifacts of all plays except the newest."""
    for folder in sorted(state_folder("plays").iterdir())[:-KEPT_PLAYS]:
        shutil.rmtree(folder, ignore_errors=True)
