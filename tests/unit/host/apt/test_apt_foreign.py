"""Packages and sources of somebody else: the first stay unless they may go, the second are named and stop nothing."""

import sys
from pathlib import Path

import pytest

from tests.unit.host.apt.test_apt_output import CONFLICT, GONE, UNSIGNED
from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs, programs  # noqa: F401 - a fixture

PACKAGES = load_module("apt_packages")
INSTALLED = {"docker.io": "20.10 installed install", "gpu-stack": "1 installed install", "libheld": "2 installed hold"}


class Host:
    """A host whose stand-in apt-get removes gpu-stack with docker.io, and reads the sources of a folder."""

    def __init__(self, programs: Programs, folder: Path) -> None:  # noqa: F811
        self.programs, self.folder, self.sources = programs, folder, folder / "apt"
        (self.sources / "sources.list.d").mkdir(parents=True)
        (folder / "update").touch()
        self.packages(INSTALLED)
        self.simulate("Remv gpu-stack [1]\nRemv docker.io [20.10]\nInst docker-ce (5:29 Docker [amd64])")
        for name in ("dpkg", "apt-mark", "apt-cache"):
            programs.put(name)

    def packages(self, found: dict[str, str]) -> None:
        rows = "\n".join(f"{name} {rest}" for name, rest in found.items())
        self.programs.put("dpkg-query", f"cat <<'END'\n{rows}\nEND")

    def simulate(self, output: str, code: int = 0) -> None:
        self.programs.put(
            "apt-get",
            'case " $* " in',
            f"*' --simulate install '*) cat <<'END'\n{output}\nEND\nexit {code} ;;",
            # As apt does with -y: the packages of the kit are held.
            "*' --simulate remove --allow-change-held-packages '*)",
            "printf 'Remv gpu-stack [1]\\nRemv docker.io [20.10]\\n' ;;",
            "*' remove '*) echo 'E: Held packages were changed and -y was used'; exit 100 ;;",
            f"*' update '*) cat {self.folder}/update; ! grep -q ^E: {self.folder}/update ;;",
            "esac",
        )

    def call(self, **more: object) -> dict:
        settings = {"section": "docker", "names": ["docker-ce"], "conflicting": ["docker.io"], "hold": False, **more}
        return call_module(PACKAGES, self.folder / "records", **settings)

    @property
    def installs(self) -> list[str]:
        return [call for call in self.programs.calls("apt-get") if " install " in call and "--simulate" not in call]


@pytest.fixture
def host(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:  # noqa: F811
    made = Host(programs, tmp_path)
    texts = PACKAGES.transaction.source_texts
    monkeypatch.setattr(PACKAGES.transaction, "source_texts", lambda: texts(str(made.sources)))
    return made


@pytest.mark.parametrize("check_mode", [True, False])
def test_packages_that_would_go_as_well_are_listed_and_stay(host: Host, check_mode: bool) -> None:
    result = host.call(check_mode=check_mode)
    assert result["failed"] and result["dragged"] == ["gpu-stack"]
    assert "gpu-stack 1" in result["msg"] and "docker_remove_dependents: true" in result["msg"]
    assert not host.installs and not (host.folder / "records").exists()


def test_they_go_where_that_is_allowed_and_the_diff_shows_them(host: Host) -> None:
    result = host.call(remove_dependents=True)
    assert result["changed"] and result["removed"] == ["docker.io", "gpu-stack"] and len(host.installs) == 1
    assert "gpu-stack 1\n" in result["diff"]["before"] and "gpu-stack" not in result["diff"]["after"]


def test_a_check_on_a_host_that_does_not_know_the_repository_lists_what_depends_on_the_packages(host: Host) -> None:
    host.simulate("E: Unable to locate package docker-ce", 100)
    result = host.call(check_mode=True)
    assert result["failed"] and result["dragged"] == ["gpu-stack"]


@pytest.mark.parametrize("plan", ["Remv libheld [2]", "Inst libheld [2] (3 Docker [amd64])"])
def test_a_package_that_somebody_holds_is_not_changed(host: Host, plan: str) -> None:
    host.simulate(plan)
    result = host.call()
    assert result["failed"] and "libheld 2 (held by somebody)" in result["msg"] and not host.installs


def test_the_kits_leave_drags_nobody_along(host: Host) -> None:
    host.simulate("Inst docker-ce (5:29 Docker [amd64])")
    host.packages({"gpu-stack": "1 installed install"})
    host.call(conflicting=[])
    host.packages({"docker-ce": "5:29 installed install", "gpu-stack": "1 installed install"})
    result = host.call(state="absent")
    assert result["failed"] and result["dragged"] == ["gpu-stack", "docker.io"]
    assert all(
        "--simulate" in call
        for call in host.programs.calls("apt-get")
        if call.endswith(" docker-ce") and " remove " in call
    )


@pytest.mark.parametrize(
    ("output", "uri"), [(GONE, "http://vendor.example/agent"), (UNSIGNED, "https://nvidia.example/cuda/x86_64")]
)
def test_a_source_of_somebody_else_is_named_with_its_file_and_stops_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, output: str, uri: str
) -> None:
    (host.sources / "sources.list.d/vendor.list").write_text(f"deb {uri} stable main\n")
    (host.folder / "update").write_text(output)
    warned: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _, words: warned.append(words))
    result = host.call(conflicting=[], remove_dependents=True, repository="https://download.docker.com/linux/{id}")
    assert result["changed"] and len(host.installs) == 1
    (words,) = warned
    assert uri in words and str(host.sources / "sources.list.d/vendor.list") in words and "not the kit's" in words


def test_the_kits_own_repository_is_reported_as_such(host: Host) -> None:
    (host.folder / "update").write_text(GONE)
    result = host.call(repository="http://vendor.example/agent")
    assert result["failed"] and "The package repository does not answer." in result["msg"] and not host.installs


def test_a_source_that_contradicts_another_is_left_aside(
    host: Host,
    programs: Programs,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apt = sys.modules[PACKAGES.Apt.__module__]
    real = apt.source_texts
    monkeypatch.setattr(apt, "source_texts", lambda: real(str(host.sources)))
    for name in ("a", "b"):
        text = f"deb [signed-by=/k/{name}.gpg] http://v.example/x stable main\n"
        (host.sources / f"sources.list.d/{name}.list").write_text(text)
    (host.sources / "sources.list.d/docker.sources").write_text("URIs: http://d.example\n")
    programs.put(
        "apt-get",
        f"parts={host.sources}/sources.list.d",
        'for word; do case "$word" in Dir::Etc::sourceparts=*) parts=${word#*=} ;; esac; done',
        f'ls "$parts" > {host.folder}/parts',
        f"[ -e $parts/a.list ] && [ -e $parts/b.list ] || exit 0\ncat >&2 <<'END'\n{CONFLICT}END\nexit 100",
    )
    warned: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _, words: warned.append(words))
    assert host.call(conflicting=[])["changed"]
    assert (host.folder / "parts").read_text().split() == ["a.list", "docker.sources"]
    assert any("b.list" in words and "Conflicting values" in words for words in warned)
    assert (host.sources / "sources.list.d/b.list").exists()


BROKEN = "dpkg: error processing package agent (--configure):"


def _interrupted(host: Host, name: str) -> None:
    host.programs.put(
        "dpkg", f'case "$1" in --audit) echo {name} ;; *) echo "{BROKEN.replace("agent", name)}" >&2; exit 1 ;; esac'
    )


def test_a_package_of_somebody_that_dpkg_cannot_configure_is_named_and_stops_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    _interrupted(host, "agent")
    warned: list[str] = []
    monkeypatch.setattr("ansible.module_utils.basic.AnsibleModule.warn", lambda _, words: warned.append(words))
    assert host.call(conflicting=[], remove_dependents=True)["changed"] and len(host.installs) == 1
    assert any("cannot configure agent, which is not the kit's" in words for words in warned)


def test_a_package_of_the_kit_that_dpkg_cannot_configure_is_a_failure(host: Host) -> None:
    _interrupted(host, "docker-ce")
    result = host.call(conflicting=[], remove_dependents=True)
    assert (
        result["failed"] and "dpkg cannot finish what was begun." in result["msg"] and "where:    dpkg" in result["msg"]
    )
