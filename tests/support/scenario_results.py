"""Results of molecule scenarios, cached under the hash of everything that a scenario depends on.

A scenario takes minutes, and few commits change its inputs. `Scenario.passed` returns an earlier result if no input
changed. The hash covers too many inputs rather than too few. MIXTRAL_RUN_TEST_NO_CACHE=1 runs every scenario.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

NO_CACHE = "MIXTRAL_RUN_TEST_NO_CACHE"
MAX_AGE_DAYS = 14
"""Hosts install packages of Debian's mirror, which moves on without any file of this checkout changing."""
ROLE_USERS = ("include_role", "import_role", "ansible.builtin.include_role", "ansible.builtin.import_role")
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML has it: ten times as fast."""
TREE_FILES = ("ansible.cfg", "constraints.txt", "pyproject.toml")
ENVIRONMENT = ("ANSIBLE_", "MOLECULE_", "MIXTRAL_RUN_TEST_RELEASE")
"""Beginnings of the names of variables that change how a scenario runs."""


IMPORT = re.compile(r"^[ ]*(?:from|import)[ ]+(mixtral_run[\w.]*)(?:[ ]+import[ ]+(\([^)]*\)|[^\n]*))?", re.MULTILINE)


@dataclass(frozen=True)
class Passed:
    """Scenario that passed: the time at which it ended, as text, and its duration."""

    when: str
    seconds: float


@dataclass(frozen=True)
class Scenario:
    """Molecule scenario of a checkout, and the folder of its results.

    folder: the folder of the scenario, relative to root. harness: files and folders that run it, relative to root (the
    test hosts, the test, this module). results: the folder with the results of all checkouts.
    """

    root: Path
    folder: str
    harness: tuple[str, ...]
    results: Path

    @property
    def name(self) -> str:
        return Path(self.folder).name

    def inputs(self) -> list[Path]:
        """Return every file that the scenario depends on, sorted."""
        found = {self.root / name for name in TREE_FILES}
        for place in ("plugins", self.folder, *self._own_role(), *self.harness):
            found.update(_files(self.root / place))
        found.update(self._imported(path for path in found if path.suffix == ".py"))
        texts = [path for path in _files(self.root / self.folder) if path.suffix == ".yml"]
        if any("disk:" in path.read_text(encoding="utf-8") for path in texts):  # its images contain these files
            found.update(_files(self.root / "roles/image/files"))
        if any("playbooks/" in path.read_text(encoding="utf-8") for path in texts):
            playbooks = list(_files(self.root / "playbooks"))
            found.update(playbooks)
            texts += [path for path in playbooks if path.suffix == ".yml"]
        roles = self._roles(texts)
        for role in roles:
            found.update(path for path in _files(self.root / "roles" / role) if "molecule" not in path.parts)
        if "image" in roles:  # the image contains the kit
            found.update(_files(self.root / "mixtral_run"))
        return sorted(found)

    def key(self, engine: str = "") -> str:
        """Return the hash of the inputs' names, modes and contents, and of the versions of all programs that read them.

        engine: the version of the Docker engine that runs the test hosts.
        """
        digest = hashlib.sha256()
        packages = sorted({f"{each.name}=={each.version}" for each in importlib.metadata.distributions()})
        settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(ENVIRONMENT))
        for fact in (self.folder, sys.version, platform.release(), engine, *settings, *packages):
            digest.update(f"{fact}\n".encode())
        for path in self.inputs():
            digest.update(
                f"{path.relative_to(self.root)} {os.access(path, os.X_OK)} {_content(*_state(path))}\n".encode()
            )
        return digest.hexdigest()

    def passed(self, key: str) -> Passed | None:
        """Return the result under this key. Return None if it is missing or too old, or if the cache is disabled."""
        file = self._file(key)
        if os.environ.get(NO_CACHE, "0") not in ("", "0") or not file.exists():
            return None
        if time.time() - file.stat().st_mtime > MAX_AGE_DAYS * 86400:
            return None
        return Passed(**json.loads(file.read_text(encoding="utf-8")))

    def record(self, key: str, seconds: float) -> None:
        """Store that the scenario passed under this key, and delete results that are too old."""
        self.results.mkdir(parents=True, exist_ok=True)
        for old in self.results.glob(f"{self.name}-*.json"):
            if time.time() - old.stat().st_mtime > MAX_AGE_DAYS * 86400:
                old.unlink(missing_ok=True)
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
        unfinished = self._file(key).with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps({"when": when, "seconds": round(seconds, 1)}), encoding="utf-8")
        unfinished.replace(self._file(key))

    def _imported(self, paths: Iterable[Path]) -> set[Path]:
        """Return the modules of the kit that these Python files import, directly or indirectly."""
        found: set[Path] = set()
        waiting = list(paths)
        while waiting:
            for module, names in _imports(*_state(waiting.pop())):
                for name in (module, *(f"{module}.{each}" for each in re.findall(r"\w+", names))):
                    parts = name.split(".")
                    packages = [self.root.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
                    fresh = {
                        path
                        for path in (*packages, self.root.joinpath(*parts[:-1], f"{parts[-1]}.py"))
                        if path.is_file()
                    }
                    waiting += fresh - found
                    found |= fresh
        return found

    def _file(self, key: str) -> Path:
        return self.results / f"{self.name}-{key[:32]}.json"

    def _own_role(self) -> tuple[str, ...]:
        parts = Path(self.folder).parts
        return ("/".join(parts[:2]),) if parts[0] == "roles" else ()

    def _roles(self, texts: list[Path]) -> set[str]:
        """Return the roles that the files use, directly or indirectly, or every role if a name is computed."""
        known = {path.name for path in (self.root / "roles").iterdir() if path.is_dir()}
        roles: set[str] = set()
        waiting = [*texts, *(path for place in self._own_role() for path in _files(self.root / place))]
        while waiting:
            path = waiting.pop()
            if path.suffix != ".yml":
                continue
            for name in _roles_in(*_state(path)):
                if name not in known:
                    return known
                if name not in roles:
                    roles.add(name)
                    waiting += [each for each in _files(self.root / "roles" / name) if "molecule" not in each.parts]
        return roles


def _state(path: Path) -> tuple[Path, int, int]:
    """Return what tells a file from an earlier state of it, which this process has read before."""
    found = path.stat()
    return path, found.st_mtime_ns, found.st_size


@cache
def _content(path: Path, _: int, __: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _imports(path: Path, _: int, __: int) -> list[tuple[str, str]]:
    return IMPORT.findall(path.read_text(encoding="utf-8"))


@cache
def _roles_in(path: Path, _: int, __: int) -> list[str]:
    return list(_names_of_roles(yaml.load(path.read_text(encoding="utf-8"), YAML_LOADER)))


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    for path in place.rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def _names_of_roles(document: Any) -> Iterator[str]:
    """Yield the names of roles in a playbook, a list of tasks, a role's meta or a scenario's molecule.yml."""
    if isinstance(document, list):
        for each in document:
            yield from _names_of_roles(each)
    if not isinstance(document, dict):
        return
    for key, value in document.items():
        if key in ROLE_USERS:
            yield str(value["name"]) if isinstance(value, dict) else re.sub(r".*\bname=(\S+).*", r"\1", str(value))
        elif key in ("roles", "dependencies") and isinstance(value, list):
            yield from (
                str(each.get("role", each.get("name"))) if isinstance(each, dict) else str(each) for each in value
            )
        elif key == "role" and isinstance(value, str):
            yield value
        yield from _names_of_roles(value)
