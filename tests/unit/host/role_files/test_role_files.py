"""Roles say of themselves what they take: argument specs, defaults, README, and what the image is made from."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.host.conftest import load_module

ROOT = Path(__file__).parents[4]
MODULES = sorted((ROOT / "plugins/modules").glob("*.py"))
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir())
TYPES = {"bool": bool, "int": int, "float": (int, float), "str": str, "list": list, "dict": dict}


def _yaml(path: str) -> dict:
    return yaml.safe_load((ROOT / path).read_text())


def _documentation(path: Path) -> dict:
    return yaml.safe_load(re.search(r'DOCUMENTATION = """\n(.*?)"""', path.read_text(), re.DOTALL).group(1))


def _options(role: str) -> dict:
    return _yaml(f"roles/{role}/meta/argument_specs.yml")["argument_specs"]["main"]["options"]


@pytest.mark.parametrize("role", ROLES)
def test_argument_specs_equal_the_defaults(role: str) -> None:
    defaults, options = _yaml(f"roles/{role}/defaults/main.yml"), _options(role)
    assert {name: option["default"] for name, option in options.items()} == defaults
    for name, option in options.items():
        expected = TYPES[option["type"]]
        assert isinstance(defaults[name], expected) and (option["type"] == "bool") == isinstance(defaults[name], bool)
        assert option["description"].strip()


@pytest.mark.parametrize("role", ROLES)
def test_variables_bear_the_roles_name(role: str) -> None:
    assert all(name.startswith(f"{role}_") for name in _options(role))
    used = set()
    for path in (
        each for folder in ("tasks", "vars", "templates") for each in (ROOT / "roles" / role / folder).glob("*")
    ):
        used |= set(re.findall(rf"(?<![a-z_]){role}_[a-z_]+", path.read_text()))
    defaults = (ROOT / f"roles/{role}/defaults/main.yml").read_text()
    within = {name for name in _options(role) if len(re.findall(rf"\b{name}\b", defaults)) > 1}
    assert set(_options(role)) - used - within == set(), "declared, and used nowhere"
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    assert used - set(_options(role)) <= set(ROLES) | modules, "used, and declared nowhere"


@pytest.mark.parametrize("role", ROLES)
def test_readme_has_an_example_tags_and_every_variable_with_its_default(role: str) -> None:
    text = (ROOT / f"roles/{role}/README.md").read_text()
    assert text.startswith(f"# {role}\n") and f"{role}_state: absent" in text
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| `(.*?)` \| \S", text, re.MULTILINE))
    assert set(rows) == set(_options(role))
    for name, option in _options(role).items():
        assert rows[name] in (json.dumps(option["default"], ensure_ascii=False), "defaults/main.yml"), name
    example = text.partition("## Example\n\n")[2].partition("\n\n")[0]
    (play,) = yaml.safe_load(example)
    assert set(play["roles"][0]["vars"]) <= set(_options(role))
    tags = {
        tag
        for path in (ROOT / "roles" / role / "tasks").glob("*.yml")
        for tag in re.findall(r"role_[a-z]+", path.read_text())
        if tag != "role_path"
    }
    line = next(line for line in text.splitlines() if line.startswith("Tags: "))
    assert set(re.findall(r"role_[a-z]+", line)) == tags - {"role_path"}


def test_group_vars_name_only_variables_that_exist() -> None:
    known = {name for role in ROLES for name in _options(role)}
    text = (ROOT / "inventory/group_vars/all.yml").read_text()
    named = {name for name in re.findall(r"^(?:# )?([a-z_]+):", text, re.MULTILINE) if not name.startswith("mixtral_")}
    assert named and named <= known


def test_group_vars_show_the_defaults_that_the_roles_have() -> None:
    defaults = {name: option["default"] for role in ROLES for name, option in _options(role).items()}
    text = (ROOT / "inventory/group_vars/all.yml").read_text()
    block = "\n".join(line[2:] for line in text.splitlines() if re.match(r"# ([a-z_]+:|  - )", line))
    shown = yaml.safe_load(block)
    assert shown and shown == {name: defaults[name] for name in shown}


def test_the_example_inventory_needs_other_names_alone() -> None:
    inventory = ROOT / "inventory/hosts.example.yml"
    programs = Path(sys.executable).parent
    words = ["-i", str(inventory)]
    listed = subprocess.run(
        [programs / "ansible-inventory", *words, "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    hosts = json.loads(listed.stdout)["_meta"]["hostvars"]
    assert set(hosts) == {"gpu-01", "gpu-02"}
    group_vars = _yaml("inventory/group_vars/all.yml")
    wanted = {**group_vars, "ansible_user": "ubuntu"}
    assert all(wanted.items() <= host.items() for host in hosts.values())
    for playbook in (ROOT / "playbooks").glob("*.yml"):
        subprocess.run([programs / "ansible-playbook", *words, "--syntax-check", playbook], cwd=ROOT, check=True)


def test_the_image_holds_what_the_extra_train_asks_for_at_the_pinned_versions() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {
        re.split(r"[<>=]", each)[0].lower() for each in (*extras["train"], *extras["data"], *extras["stores"])
    } - {"mixtral-run[data]"}
    lines = (ROOT / "roles/image/files/requirements.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    assert wanted <= set(pins)
    assert set(pins) - wanted == {"click", "pyyaml", "rich"}
    constraints = dict(
        line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert pins == {name: constraints[name] for name in pins}


def test_every_module_of_the_kit_tells_its_options() -> None:
    for path in (ROOT / "plugins/modules").glob("*.py"):
        documented = _documentation(path)
        assert documented["module"] == path.stem and documented["short_description"]


@pytest.mark.parametrize("name", [path.stem for path in MODULES if "\nOPTIONS = {" in path.read_text()])
def test_a_modules_documentation_equals_its_options(name: str) -> None:
    documented, module = _documentation(ROOT / f"plugins/modules/{name}.py"), load_module(name)
    fields = ("type", "required", "default", "choices", "elements")
    for option, values in module.OPTIONS.items():
        described = documented["options"].pop(option)
        assert [described.get(field) for field in fields] == [values.get(field) for field in fields]
    assert not documented["options"]


def test_bootstrap_checks_the_variables_of_every_role_that_it_imports() -> None:
    play = _yaml("playbooks/bootstrap.yml")[0]
    (block,) = [task["block"] for task in play["tasks"] if "block" in task]
    imported = [task["ansible.builtin.import_role"] for task in block[2:]]
    assert block[0]["mixtral_run.hosts.role_arguments"]["roles"] == [role["name"] for role in imported]
    assert all(role["rolespec_validate"] is False for role in imported) and block[0]["tags"] == ["always"]
    assert "mixtral_run.hosts.host_visit" in block[1] and block[1]["tags"] == ["always"]
    assert {role["name"] for role in imported} == set(ROLES)


NEWER_THAN_PYTHON_3_8 = (
    "removeprefix", "removesuffix", "usedforsecurity", "is_relative_to", "functools.cache\n", "import cache\n",
    "pairwise", "strict=", "zoneinfo", "with_stem", ".readlink()", "hardlink_to", "bit_count", "graphlib",
)  # fmt: skip


def test_what_runs_on_hosts_is_python_3_8() -> None:
    import ast

    for path in [*(ROOT / "plugins/modules").glob("*.py"), *(ROOT / "plugins/module_utils").rglob("*.py")]:
        text = path.read_text()
        ast.parse(text, feature_version=(3, 8))
        newer = [name for name in NEWER_THAN_PYTHON_3_8 if name in text]
        # kept_files.py goes without the word where Python does not know it.
        assert newer == (["usedforsecurity"] if path.name == "kept_files.py" else []), path


def test_packages_that_containers_stand_on_wait_for_jobs() -> None:
    tasks = [
        (path.parts[-3], task["mixtral_run.hosts.apt_packages"])
        for path in (ROOT / "roles").glob("*/tasks/*.yml")
        for task in yaml.safe_load(path.read_text())
        if "mixtral_run.hosts.apt_packages" in task
    ]
    assert len(tasks) >= 4
    for role, settings in tasks:
        assert settings["restart_when_busy"] == f"{{{{ {role}_restart_when_busy }}}}"
        # The message names the variable by the section.
        assert settings["section"] == role


def _tasks(document: Any) -> Iterator[dict[str, Any]]:
    """Yield every task of a list of tasks or plays, those in blocks too."""
    for entry in document if isinstance(document, list) else []:
        if isinstance(entry, dict):
            yield entry
            for name in ("tasks", "block", "rescue", "always", "handlers", "pre_tasks", "post_tasks"):
                yield from _tasks(entry.get(name))


def test_the_kits_modules_are_called_by_the_name_of_the_collection() -> None:
    """An action plugin that runs its module must not name it either: without the collection it is not found."""
    names = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    folders = (ROOT / "roles", ROOT / "playbooks", ROOT / "tests/molecule")
    files = [path for folder in folders for path in folder.rglob("*.yml")]
    called = set()
    for path in files:
        for task in _tasks(yaml.safe_load(path.read_text())):
            assert not names & set(task), f"{path}: {task.get('name')}"
            called |= {key.removeprefix("mixtral_run.hosts.") for key in task if key.startswith("mixtral_run.hosts.")}
    assert called == names
    for path in (ROOT / "plugins/action").glob("*.py"):
        assert not re.search(r"_execute_module\(\s*(?:module_name=)?\"", path.read_text()), path


def test_every_task_of_a_role_says_what_it_is_for() -> None:
    """--tags role_install, role_configure and role_run choose within every role; included files inherit no tags."""
    texts = [path.read_text() for path in (ROOT / "roles").glob("*/tasks/*.yml")]
    # What is imported has the tags of the import. What an include applies `always` to runs when the include does.
    inheriting = {name for text in texts for name in re.findall(r"import_tasks: (\w+)\.yml", text)}
    inheriting |= {
        name for text in texts for name in re.findall(r"file: (\w+)\.yml\n +apply: {tags: \[always\]}", text)
    }
    for path in (ROOT / "roles").glob("*/tasks/*.yml"):
        for task in yaml.safe_load(path.read_text()):
            if "ansible.builtin.import_tasks" not in task and path.stem not in inheriting:
                assert set(task.get("tags", [])) & {"role_install", "role_configure", "role_run"}, (path, task["name"])
