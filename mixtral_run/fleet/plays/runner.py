"""Running playbooks by ansible-runner: the one place that imports it."""

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

from mixtral_run.errors import ConfigError, MixtralRunError
from mixtral_run.fleet.hosts import GROUP, Host, inventory_names, unresolved_variables
from mixtral_run.fleet.plays.provisioning import provisioning_folder
from mixtral_run.fleet.state import state_folder, write_json, write_private
from mixtral_run.fleet.untrusted import printable

POLL_SECONDS = 0.2
"""How often ansible-runner looks whether it was cancelled; its own default of 5 s makes a slow Ctrl-C."""
KEPT_PLAYS = 50

KEPT_VARIABLES = re.compile(
    r"(ANSIBLE|AWX|RUNNER|SSH|LC|XDG|PYTHON|KRB5)_?\w*$|(PATH|HOME|USER|LOGNAME|LANG|LANGUAGE|SHELL|TERM|TMPDIR|TZ|VIRTUAL_ENV)$"
    r"|(https?|no|all)_proxy$",
    re.IGNORECASE,
)
"""What Ansible needs of the environment; anything else, such as HF_TOKEN, stays out of its artifacts."""

HAND_ON = (
    "import json, os, sys; file, *words = sys.argv[1:]; os.environ.update(json.load(open(file))); os.unlink(file); "
    "os.execvp(words[0], words)"
)
"""A program that starts another with the variables of a file besides, which it removes."""

BECOME_PROMPT = r"BECOME password[^:]*:\s*?$"


@dataclass(frozen=True, kw_only=True)
class Play:
    """One run of a playbook over hosts."""

    playbook: Path
    hosts: tuple[Host, ...]
    inventory: Path | None = None
    """The user's own inventory, where there is one; hosts are then limited to `hosts`."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """What the kit itself sets; the user's extra variables win."""
    extra_vars: tuple[str, ...] = ()
    """As `ansible-playbook --extra-vars` takes them."""
    tags: tuple[str, ...] = ()
    check: bool = False
    diff: bool = False
    forks: int = 50
    ssh_args: tuple[str, ...] = ()
    become_password: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class PlayEnd:
    """How a play ended."""

    status: str
    """successful, failed, canceled or timeout, in ansible-runner's words."""
    exit_code: int
    artifacts: Path
    """Folder with the play's whole output (`stdout`) and events."""
    output: str


def arguments(play: Play, variables_file: Path, extra_files: Sequence[Path]) -> list[str]:
    """The words of ansible-playbook after inventory and playbook. No secret is among them."""
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
    """Ansible's settings. They land in the artifacts: nothing secret may be among them."""
    return {
        "ANSIBLE_CONFIG": str(provisioning_folder() / "ansible.cfg"),
        # Not the common arguments, which an inventory's ansible_ssh_common_args (a jump host, say) would take the place
        # of: these come first on ssh's command line, where the first value of an option wins.
        "ANSIBLE_SSH_ARGS": shlex.join(play.ssh_args),
        "ANSIBLE_HOST_KEY_CHECKING": "True",
        "ANSIBLE_DEPRECATION_WARNINGS": "False",
        "ANSIBLE_FORCE_COLOR": "False",
        "ANSIBLE_NOCOLOR": "True",
        # The Ansible of this very environment, also where its folder is not on PATH (pipx).
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }


def parse_extra_vars(words: Sequence[str]) -> tuple[list[Path], dict[str, Any]]:
    """Files (`@FILE`) and values (`name=value …`, JSON or YAML) of --extra-vars. Raises ConfigError with all faults."""
    import yaml

    files: list[Path] = []
    values: dict[str, Any] = {}
    problems: list[str] = []
    for word in words:
        if word.startswith("@"):
            file = Path(word[1:]).expanduser().resolve()
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
    """What `ansible-inventory --list` says of an inventory: groups, and `_meta.hostvars`. Raises ConfigError.

    Connection variables are resolved where they are templates.
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
        raise ConfigError(
            "The inventory cannot be read.", where=str(path), found=(errors or output).strip()[-500:]
        ) from error
    if "Failed to parse" in (errors or "") or not inventory_names(found):
        raise ConfigError("The inventory names no host.", where=str(path), found=(errors or "no host").strip()[-500:])
    _resolve_variables(path, found)
    return found


def _resolve_variables(path: Path, listing: dict[str, Any]) -> None:
    """Put values in the place of templates, which ansible-inventory leaves as they are."""
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
        raise ConfigError("The inventory does not say how to get to its hosts.", where=str(path), problems=problems)


def _resolved(path: Path, hosts: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, Any] | str]:
    """Variables of hosts as Ansible resolves them, or why it cannot. Connects to nobody."""
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
    """`role · task` for each task of a playbook, in order; no host is touched."""
    import ansible_runner

    settings = environment(Play(playbook=playbook, hosts=()))
    words = [str(playbook), "--inventory", "localhost,", "--list-tasks"]
    with _own_folder("list") as folder, _search_path(settings["PATH"]):
        output, _, _ = ansible_runner.run_command(
            "ansible-playbook", words, quiet=True, private_data_dir=str(folder), envvars=settings
        )
    lines = [line.strip() for line in printable(output).splitlines() if "TAGS:" in line]
    # What each role's argument_specs check by themselves is no step of a play for a person.
    shown = [line for line in lines if not line.startswith("play ") and "Validating arguments" not in line]
    return [line.split("TAGS:")[0].strip().replace(" : ", " · ") for line in shown]


@contextmanager
def _search_path(value: str) -> Iterator[None]:
    """ansible-runner looks for Ansible's programs on this process's own PATH."""
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
    """A private folder that is gone afterwards."""
    path = state_folder("tmp", f"{name}-{uuid.uuid4().hex[:8]}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class RunningPlay:
    """A play in a thread of its own. Iterate `events()`; call `cancel()` from anywhere."""

    def __init__(self, play: Play) -> None:
        import ansible_runner

        self.play = play
        self.ident = time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]
        self.folder = state_folder("plays", self.ident)
        state_folder("plays", self.ident, "artifacts")  # ansible-runner would make it readable for everybody
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
        # ansible-runner hands on this process's whole environment, and writes it into the artifacts.
        self._runner.config.env = {
            name: value for name, value in self._runner.config.env.items() if KEPT_VARIABLES.match(name)
        }
        self._thread = threading.Thread(target=self._run, name="play", daemon=True)

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts" / "run"

    def events(self, interval_seconds: float = 0.2) -> Iterator[dict[str, Any] | None]:
        """The play's events as they come, and None whenever nothing came for an interval; ends with the play."""
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
        """Kill Ansible; what it had begun on a host may go on there for a moment."""
        self._cancelled.set()

    def wait(self, seconds: float | None = None) -> PlayEnd:
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
                # A plugin that asks a cloud for its hosts finds its keys there, as it did when they were listed. In the
                # runner's own environment they would be written into the artifacts.
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
        # Ansible takes a .json file for YAML, which it is.
        return path

    def _arguments(self) -> list[str]:
        # ansible-runner reads its settings from this file alone once suppress_env_files is set.
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
    """Remove the artifacts of all but the newest plays."""
    for folder in sorted(state_folder("plays").iterdir())[:-KEPT_PLAYS]:
        shutil.rmtree(folder, ignore_errors=True)
