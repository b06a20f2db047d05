"""What packages bring and leave, with the answers of dpkg and apt written out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.apt import apt_footprint
from ansible.module_utils.mixtral_run_host.apt.apt_footprint import Footprint
from ansible.module_utils.mixtral_run_host.commands import Result


def footprint(leftovers: tuple[str, ...] = (), groups: tuple[str, ...] = (), values: Any = None) -> Any:
    record = SimpleNamespace(values={"docker_footprint": values} if values else {})
    return Footprint(record, "docker", leftovers, groups), record.values


def test_what_is_noted_before_an_installation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    monkeypatch.setattr(apt_footprint, "_with_settings_only", lambda: {"engine", "old", "dep"})
    monkeypatch.setattr(apt_footprint, "_group", lambda name: name == "known")
    names = tuple(str(tmp_path / name) for name in ("there", "link", "none"))
    kept, values = footprint(names, ("known", "new"))
    kept.note([], ["dep"])
    assert values == {}
    kept.note(["engine"], ["engine", "dep", "lib"])
    first = {
        "leftovers": list(names[:2]), "groups": ["known"], "settings": ["dep", "engine"], "brought": ["dep", "lib"],
    }  # fmt: skip
    assert values == {"docker_footprint": first}
    # A later package adds to it; what was on the host is what was there before the first.
    (tmp_path / "none").touch()
    kept.note(["old"], ["old", "more"])
    assert values["docker_footprint"] == {
        **first, "settings": ["dep", "engine", "old"], "brought": ["dep", "lib", "more"],
    }  # fmt: skip


def test_what_nothing_needs_any_more() -> None:
    asked: list[Any] = []

    def simulate(words: list[str]) -> tuple[Any, None]:
        asked.append(words)
        return SimpleNamespace(removed=["engine", "dep", "other"]), None

    apt: Any = SimpleNamespace(simulate=simulate)
    kept, _ = footprint(values={"brought": ["dep", "lib", "engine", "gone"]})
    assert kept.unneeded(apt, ["engine"], ["engine", "dep", "lib", "other"]) == ["dep"]
    assert asked == [["autoremove", "--allow-change-held-packages", "-o", "APT::Ignore-Hold=true", "engine"]]
    assert kept.unneeded(apt, [], ["dep"]) == kept.unneeded(apt, ["engine"], ["other"]) == []
    assert footprint()[0].unneeded(apt, ["engine"], ["dep"]) == [] and len(asked) == 1


@pytest.mark.parametrize("code", [0, 1])
def test_what_is_swept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    """Settings that were there before stay, and groups with members, and what was there or holds something."""
    called: list[list[str]] = []
    for name in ("new", "before"):
        (tmp_path / name).touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()

    def run(words: list[str], timeout: float = 60) -> Result:
        called.append([*words, str(timeout)] if words[0] == "dpkg" else words)
        return Result(code if words[0] == "dpkg" else 0, "", "one\ntwo\nthree\n")

    members = {"empty": [], "used": ["ana"], "old": []}
    monkeypatch.setattr(apt_footprint, "run", run)
    monkeypatch.setattr(apt_footprint, "_with_settings_only", lambda: {"engine", "dep", "other", "kept"})
    monkeypatch.setattr(
        apt_footprint, "_group", lambda name: SimpleNamespace(gr_mem=members[name]) if name in members else None
    )
    names = tuple(str(tmp_path / name) for name in ("new", "before", "folder", "full", "none"))
    values = {"leftovers": [names[1]], "groups": ["old"], "brought": ["dep"], "settings": ["kept"]}
    swept, record = footprint(names, ("empty", "used", "old", "missing"), values)
    apt: Any = SimpleNamespace(when_free=lambda work: work())
    warnings = swept.sweep(apt, ["engine", "kept"])
    assert called == [["dpkg", "--purge", "dep", "engine", "300"], ["groupdel", "empty"]]
    assert [each.split(": ")[0] for each in warnings] == ["The settings of removed packages stay"] * code
    assert all("two" in each and "three" in each and "one" not in each for each in warnings)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["before", "full"] and record == {}
    called.clear()
    assert swept.sweep(apt, ["engine"]) == [] and called == []


def test_packages_of_which_only_settings_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    out = "a config-files\nb installed\nc half-installed\nd config-files\ne aaa\n"
    monkeypatch.setattr(apt_footprint, "run", lambda _: Result(0, out, ""))
    assert apt_footprint._with_settings_only() == {"a", "d"}
    assert apt_footprint._group("no such group") is None and apt_footprint._group("root").gr_gid == 0
