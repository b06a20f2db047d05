"""A role ends only where nothing is left to do. Ansible starts a process for each task that it skips."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.module_utils.mixtral_run_host.engine import engine_unit
from jinja2 import nodes

from tests.unit.host.conftest import call_module, load_module

ROLES = Path(__file__).parents[4] / "roles"
WITH_ABSENT = sorted(path.parents[1].name for path in ROLES.glob("*/tasks/absent.yml"))
SETTINGS = {"settings": {}, "defaults": {"live-restore": True}, "needed": {}, "conflicting": ["docker.io"]}


def _tasks(file: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((ROLES / file).read_text()))


def _holds(file: str, start: str, **variables: Any) -> bool:
    """Return the value of the condition of a task, for variables that a play may not have set."""
    (task,) = [each for each in _tasks(file) if each["name"].startswith(start)]
    environment = jinja2.Environment()
    environment.filters["bool"] = lambda value: str(value).lower() in ("true", "yes", "1")
    environment.tests["changed"] = lambda result: result.get("changed", False)
    found = environment.compile_expression(task["when"], undefined_to_none=False)(**variables)
    assert isinstance(found, bool), "Ansible takes no other condition"
    return found


@pytest.mark.parametrize("role", WITH_ABSENT)
def test_what_takes_a_role_back_is_not_skipped_task_by_task(role: str) -> None:
    present, end, absent = _tasks(f"{role}/tasks/main.yml")
    assert present["ansible.builtin.import_tasks"] == "present.yml" and absent["when"] == f"{role}_state == 'absent'"
    assert (end["ansible.builtin.meta"], end["when"]) == ("end_role", f"{role}_state != 'absent'")


def test_health_ends_only_where_nothing_is_wanted_and_no_watch_is_left() -> None:
    nothing = {
        "health_watch": False, "health_node_exporter": "no", "__health_dcgm_packages": [], "health_time_service": "",
        "__health_peers": [], "__health_timer": {"stat": {"exists": False}},
    }  # fmt: skip
    end = ("health/tasks/present.yml", "End the role here")
    assert _holds(*end, **nothing)
    for name, value in {
        "health_watch": "yes", "health_node_exporter": True, "__health_dcgm_packages": ["dcgm"],
        "health_time_service": "chrony", "__health_peers": ["10.0.0.1"],
    }.items():  # fmt: skip
        assert not _holds(*end, **{**nothing, name: value})
    for timer in ({"stat": {"exists": True}}, {"skipped": True}, {}):
        assert not _holds(*end, **{**nothing, "__health_timer": timer})


def test_the_image_role_ends_only_where_no_archive_is_left() -> None:
    end = ("image/tasks/main.yml", "End the role here")
    assert _holds(*end, __image_spreads=False, __image_taken={"archive_left": False})
    assert not _holds(*end, __image_spreads=True, __image_taken={"archive_left": False})
    for taken in ({"archive_left": True}, {"skipped": True}, {}):
        assert not _holds(*end, __image_spreads=False, __image_taken=taken)
    assert not _holds(*end, __image_spreads=False)


def test_the_engine_is_compared_again_unless_preflight_compared_the_same_settings() -> None:
    task = ("docker/tasks/present.yml", "Compare the engine")
    assert not _holds(*task, __preflight_found={"engine_agrees_with": SETTINGS}, __docker_compared=SETTINGS)
    changed = {**SETTINGS, "settings": {"debug": True}}
    for found in ({"skipped": True}, {"engine_agrees_with": {}}, {"engine_agrees_with": changed}):
        assert _holds(*task, __preflight_found=found, __docker_compared=SETTINGS)
    # Facts may come from a cache, of a run before this one.
    facts = {"mixtral_run": {"engine_agrees_with": SETTINGS}}
    assert _holds(*task, ansible_facts=facts, __docker_compared=SETTINGS)


@pytest.mark.parametrize(
    ("level", "check", "agrees"),
    [
        (None, "fail", True),
        (None, "skip", True),
        ("warn", "fail", True),
        ("warn", "skip", False),
        ("fail", "warn", False),
    ],
)
def test_preflight_agrees_unless_something_is_left_to_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, level: str | None, check: str, agrees: bool
) -> None:
    module = load_module("preflight")
    monkeypatch.setattr(
        engine_unit,
        "conflicts",
        lambda *_: ([(level, engine_unit.NO_OTHER, "docker.io 20", "it goes")] if level else [], []),
    )
    monkeypatch.setattr(module.probe, "machine", lambda *_: {"memory": {"ram_gib": 1}})
    for name, value in {"_space": [], "_network": {}}.items():
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    monkeypatch.setattr(module.shortfalls, "collect", lambda *_: [])
    monkeypatch.setattr(module.shortfalls, "with_numbers", lambda limits: limits)
    result = call_module(module, tmp_path, host="gpu-01", limits={}, folders={}, image="kit", engine=SETTINGS,
                         levels={"engine": check})  # fmt: skip
    assert result["engine_agrees_with"] == (SETTINGS if agrees else {})
    assert len(result["announcements"]) == (level is not None)


def test_the_engine_is_reloaded_unless_the_docker_role_has_just_done_it() -> None:
    task = ("nvidia_container_toolkit/tasks/present.yml", "Reload Docker Engine")
    same = {"changed": False}
    results = {
        "__docker_engine": {"deferred": False}, "__nvidia_container_toolkit_packages": same,
        "__nvidia_container_toolkit_settings": same,
    }  # fmt: skip
    assert not _holds(*task, **results)
    for name in ("__nvidia_container_toolkit_packages", "__nvidia_container_toolkit_settings"):
        assert _holds(*task, **{**results, name: {"changed": True}})
    for engine in ({"deferred": True}, {"skipped": True}):
        assert _holds(*task, **{**results, "__docker_engine": engine})
    del results["__docker_engine"]
    assert _holds(*task, **results)
    # With --tags role_run, no other task of the role has run.
    assert _holds(*task) and not _holds(*task, __docker_engine={"deferred": False})


def test_a_restart_waits_for_nothing_where_the_engine_goes() -> None:
    task = ("nvidia_container_toolkit/tasks/absent.yml", "Reload Docker Engine")
    assert _holds(*task) and _holds(*task, __docker_goes=False) and not _holds(*task, __docker_goes=True)


def test_each_role_that_looks_before_its_removal_looks_once_in_a_teardown() -> None:
    """The playbook looks for all roles before the first one changes anything."""
    play = yaml.safe_load((ROLES.parent / "playbooks/teardown.yml").read_text())[0]["tasks"][0]["block"]
    imported = [each["ansible.builtin.import_role"] for each in play if "ansible.builtin.import_role" in each]
    looking = [each["name"] for each in imported if each.get("tasks_from") == "look"]
    assert looking == [each["name"] for each in imported[: len(looking)]]
    assert set(looking) == {path.parents[1].name for path in ROLES.glob("*/tasks/look.yml")}
    for role in looking:
        first = _tasks(f"{role}/tasks/absent.yml")[0]
        fact = _tasks(f"{role}/tasks/look.yml")[-1]["ansible.builtin.set_fact"]
        assert first["ansible.builtin.import_tasks"] == "look.yml"
        assert first["when"] == f"{next(iter(fact))} is not defined"


def _conditions(tasks: list[dict[str, Any]], tags: frozenset[str] = frozenset()) -> Iterator[tuple[Any, ...]]:
    """Yield (task, its tags, its conditions) for all tasks, also of blocks."""
    for task in tasks:
        own, when = task.get("tags", []), task.get("when", [])
        mine = tags | {*([own] if isinstance(own, str) else own)}
        yield task, mine, when if isinstance(when, list) else [when]
        for part in ("block", "rescue", "always"):
            yield from _conditions(task.get(part, []), mine)


def _bare(node: nodes.Node, guarded: bool = False) -> set[str]:
    """Return the names that an expression reads without a default. Those of `is defined and` count as read bare."""
    if isinstance(node, nodes.Name):
        return set() if guarded else {node.name}
    if (isinstance(node, nodes.Filter) and node.name in ("default", "d")) or isinstance(node, nodes.Test):
        guarded = isinstance(node, nodes.Filter) or node.name in ("defined", "undefined")
    elif not isinstance(node, (nodes.Getattr, nodes.Getitem)):
        guarded = False
    return set().union(*(_bare(child, guarded) for child in node.iter_child_nodes()))


def test_what_a_condition_reads_may_be_missing_where_tags_leave_out_the_task_that_registers_it() -> None:
    """`--tags role_run` runs a part of a role, and a condition that reads an undefined name fails the host."""
    environment, seen, bare = jinja2.Environment(), 0, []
    for file in sorted(ROLES.glob("*/tasks/*.yml")):
        of_role = [each for path in sorted(file.parent.glob("*.yml")) for each in _conditions(_tasks(str(path)))]
        made = {(task["register"], tags) for task, tags, _ in of_role if "register" in task}
        vars_file = file.parents[1] / "vars/main.yml"
        values = yaml.safe_load(vars_file.read_text()) if vars_file.exists() else {}
        for task, tags, conditions in _conditions(_tasks(str(file))):
            elsewhere = {name for name, others in made if others != tags and "always" not in others}
            seen += len(conditions)
            for condition in conditions:
                names = _bare(environment.parse("{{ " + str(condition) + " }}"))
                names = names.union(*(_bare(environment.parse(str(values[name]))) for name in names & values.keys()))
                bare += [f"{file.relative_to(ROLES)}, {task['name']}: {name}" for name in sorted(names & elsewhere)]
    assert seen > 20 and not bare
