"""The locks name every package of the image and of the operator, by hashes that pip checks, and no index."""

import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import locks

IMAGE = {path.stem: path for path in locks.IMAGE_LOCKS.glob("*.txt")}
ALL = {**IMAGE, "operator": locks.OPERATOR_LOCK}


def entries(path: Path) -> dict[str, list[str]]:
    """Each package of a lock, NAME==VERSION, with the words that follow it."""
    text = re.sub(r"\\\n", " ", path.read_text())
    lines = [line.split(";")[0] + " " + " ".join(re.findall(r"--\S+", line)) for line in text.splitlines()]
    return {line.split()[0]: line.split()[1:] for line in lines if not line.startswith("#")}


@pytest.mark.parametrize("name", ALL)
def test_a_lock_has_a_sha256_of_every_package_and_no_index(name: str) -> None:
    found = entries(ALL[name])
    assert found
    for package, words in found.items():
        assert re.fullmatch(r"[a-z0-9-]+(\[\w+\])?==[\w.+]+", package)
        assert words and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", word) for word in words), package
    assert not re.search(r"://|/opt|find-links|index-url|trusted-host", ALL[name].read_text())


@pytest.mark.parametrize("name", ALL)
def test_a_lock_has_the_versions_of_constraints(name: str) -> None:
    lines = [line.split("==") for line in (locks.ROOT / "constraints.txt").read_text().split()]
    versions = {canonicalize_name(package): version for package, version in lines}
    found = dict(package.split("==") for package in entries(ALL[name]))
    assert {
        each: version for each, version in found.items() if version.split("+")[0] != versions.get(each, version)
    } == {}


@pytest.mark.parametrize(("name", "roots"), [("image", locks.REQUIREMENTS), ("operator", None)])
def test_a_lock_is_complete(name: str, roots: Path | None) -> None:
    """What the installed packages declare that they need, and what that needs, is in the lock."""
    paths = [IMAGE["common"], IMAGE["cu130"]] if roots else [locks.OPERATOR_LOCK]
    locked = {package.split("==")[0].split("[")[0] for path in paths for package in entries(path)}
    if roots:
        lines = [line for line in roots.read_text().splitlines() if not line.startswith("#")]
        wanted = [Requirement(line) for line in lines]
    else:
        wanted = [Requirement(line) for line in importlib.metadata.requires("mixtral-run") or []]
        wanted = [each for each in wanted if each.marker is None]
    seen: set[str] = set()
    while wanted:
        requirement = wanted.pop()
        package = canonicalize_name(requirement.name)
        if package in seen:
            continue
        seen.add(package)
        assert package in locked, package
        try:
            further = [Requirement(line) for line in importlib.metadata.requires(package) or []]
        except importlib.metadata.PackageNotFoundError:
            continue  # CUDA's libraries, which this machine's torch does not bring
        extras = requirement.extras or {""}
        wanted += [
            each for each in further if each.marker is None or any(each.marker.evaluate({"extra": x}) for x in extras)
        ]
    assert len(seen) > 10


def test_every_package_of_torchs_build_is_in_the_builds_lock_alone() -> None:
    common = {package.split("==")[0] for package in entries(IMAGE["common"])}
    for variant in set(IMAGE) - {"common"}:
        family = {package.split("==")[0].split("[")[0] for package in entries(IMAGE[variant])}
        assert "torch" in family and not family & common


def test_the_index_is_the_one_that_pip_is_configured_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://file.example/simple\nextra-index-url = https://more.example\n"
        "find-links = /wheels\ntrusted-host = file.example\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    for name in ("PIP_INDEX_URL", "PIP_TRUSTED_HOST"):
        monkeypatch.delenv(name, raising=False)
    words = ["--default-index", "https://file.example/simple", "--allow-insecure-host", "file.example"]
    assert locks.index_words(locks.pip_settings()) == words
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment.example/simple")
    words[1] = "https://environment.example/simple"
    assert locks.index_words(locks.pip_settings()) == words


def test_a_build_of_torch_whose_index_does_not_answer_keeps_its_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = tmp_path / "uv"
    refusing.write_text("#!/bin/sh\necho 'error: Request failed: https://torch.example/cu126/click/' >&2\nexit 2\n")
    refusing.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    monkeypatch.setattr(locks.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(locks, "pip_settings", dict)
    monkeypatch.setattr(locks, "IMAGE_LOCKS", tmp_path)
    (tmp_path / "cu126.txt").write_text("before")
    assert not locks._write_variant("cu126", "https://torch.example/cu126")
    assert (tmp_path / "cu126.txt").read_text() == "before"
    words = capsys.readouterr().err
    assert "cu126.txt is not written: Request failed" in words and "--torch-index cu126=MIRROR" in words


def test_a_package_with_two_markers_stays_whole() -> None:
    old = "a==1 ; python_version < '3.12' \\\n    --hash=sha256:1\n"
    new = "a==2 ; python_version >= '3.12' \\\n    --hash=sha256:2\n"
    other = "b-c==3 \\\n    --hash=sha256:3\n"
    assert locks.split(old + new + other) == {"a": old + new, "b-c": other}
