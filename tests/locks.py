"""`make lock`: write the files that name every package of the image and of the operator with its version and hashes.

uv resolves for all platforms and Python versions at once, with the versions of constraints.txt, and reads the hashes of
all files of a release from the index. The index and its trusted hosts are those of pip's own configuration; no file
names them. Extra indexes and folders of wheels are left out: they may hold only some of the files of a release.

The digests of the base images come from their registries (base_images.py).

The lock of a CUDA build of torch needs the index of that build (`image_torch_index_urls`). Without it the existing file
stays, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.base_images import write_lock

ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "roles/image/files/requirements.txt"
IMAGE_LOCKS = ROOT / "roles/image/files/locks"
OPERATOR_LOCK = ROOT / "requirements-operator.txt"
CONSTRAINTS = ROOT / "constraints.txt"
PYTHON = "3.11"
"""The oldest Python that the locks are for."""
DEFAULT_VARIANT = "cu130"
"""The build of torch that the default index has."""
TORCH_FAMILY = re.compile(r"torch|triton|pytorch-triton|(nvidia|cuda)-.*")
"""Packages that differ between the builds of torch."""


def main(words: Sequence[str] | None = None) -> int:
    """Write the locks; return 1 if a registry or an index of torch cannot be reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch-index", action="append", default=[], metavar="VARIANT=URL", help="Mirror of a build's index."
    )
    parser.add_argument(
        "--registry", action="append", default=[], metavar="HOST=URL", help="Mirror of a base image's registry."
    )
    parser.add_argument("--base-images", action="store_true", help="Write the digests of the base images alone.")
    given = parser.parse_args(words)
    mirrors, registries = (dict(each.split("=", 1) for each in found) for found in (given.torch_index, given.registry))
    defaults = yaml.safe_load((ROOT / "roles/image/defaults/main.yml").read_text(encoding="utf-8"))
    has_digests = write_lock(IMAGE_LOCKS, defaults["image_base_images"], registries)
    if given.base_images:
        return 0 if has_digests else 1
    indexes = {**defaults["image_torch_index_urls"], **mirrors}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # Those of the build too: `pip install --no-build-isolation .` then fetches nothing.
    operator = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    _write(OPERATOR_LOCK, "the operator's side", compiled("\n".join(operator)))
    image = compiled(REQUIREMENTS.read_text(encoding="utf-8"))
    family = {name: text for name, text in image.items() if TORCH_FAMILY.fullmatch(name)}
    if "nvidia-cudnn-cu13" not in family:
        print(f"✗ torch of the default index is no build for CUDA 13: {', '.join(sorted(family))}", file=sys.stderr)
        return 1
    IMAGE_LOCKS.mkdir(exist_ok=True)
    rest = {name: text for name, text in image.items() if name not in family}
    _write(IMAGE_LOCKS / "common.txt", "the image, except torch and what differs between its builds", rest)
    _write(IMAGE_LOCKS / f"{DEFAULT_VARIANT}.txt", f"torch in the image, {DEFAULT_VARIANT}", family)
    others = [_write_variant(variant, url) for variant, url in indexes.items() if variant != DEFAULT_VARIANT]
    return 0 if all(others) and has_digests else 1


def _write_variant(variant: str, index: str) -> bool:
    try:
        found = compiled(REQUIREMENTS.read_text(encoding="utf-8"), index)
    except subprocess.CalledProcessError as error:
        words = " ".join(error.stderr.split()).removeprefix("error: ")[:300]
        print(f"✗ {variant}.txt is not written: {words}\n  next: make lock where {index} can be reached, or "
              f"LOCK_ARGS='--torch-index {variant}=MIRROR'", file=sys.stderr)  # fmt: skip
        return False
    family = {name: text for name, text in found.items() if TORCH_FAMILY.fullmatch(name)}
    _write(IMAGE_LOCKS / f"{variant}.txt", f"torch in the image, {variant}", family)
    return True


def compiled(requirements: str, torch_index: str = "") -> dict[str, str]:
    """Return the locked lines of each package that these requirements bring in, with markers and hashes, by name."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / "requirements.in"
        wanted.write_text(requirements, encoding="utf-8")
        argv = [
            str(Path(sys.executable).with_name("uv")), "--no-config", "pip", "compile", "--quiet", "--universal",
            "--python-version", PYTHON, "--generate-hashes", "--no-header", "--no-annotate",
            "--constraint", str(CONSTRAINTS), *index_words(pip_settings()), str(wanted),
        ]  # fmt: skip
        if torch_index:
            argv += ["--index", torch_index, "--index-strategy", "unsafe-best-match"]
        done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return split(done.stdout)


def split(text: str) -> dict[str, str]:
    """Split a compiled file into its packages. A package with several markers has several entries in its text."""
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=[A-Za-z0-9])", text.strip()):
        name = re.split(r"[ =;\[]", entry, maxsplit=1)[0]
        found[name] = found.get(name, "") + entry + "\n"
    return found


def pip_settings() -> dict[str, str]:
    """Return pip's configuration: files and environment variables, the latter over the former."""
    argv = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    pairs = [line.partition("=")[::2] for line in lines if "=" in line]
    ranked = sorted(pairs, key=lambda pair: (pair[0].startswith(":env:."), pair[0].startswith("install.")))
    return {name.rpartition(".")[2]: value.strip("'\"") for name, value in ranked}


def index_words(settings: dict[str, str]) -> list[str]:
    """Return uv's words for the index that pip's configuration names."""
    found = ["--default-index", settings["index-url"]] if settings.get("index-url") else []
    for host in settings.get("trusted-host", "").split():
        found += ["--allow-insecure-host", host]
    return found


def _write(file: Path, what: str, packages: dict[str, str]) -> None:
    head = f"# Packages of {what}: versions and hashes of all their files. Written by `make lock`.\n"
    file.write_text(head + "".join(packages[name] for name in sorted(packages)), encoding="utf-8")
    print(f"{file.relative_to(ROOT)}: {len(packages)} packages")


if __name__ == "__main__":
    sys.exit(main())
