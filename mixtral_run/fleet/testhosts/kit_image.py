"""Wheels and a base image for builds without an index or a registry, and an archive of a finished image for hosts."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import mixtral_run
from mixtral_run.fleet.plays.provisioning import provisioning_folder
from mixtral_run.fleet.testhosts.engine import CACHE
from mixtral_run.fleet.testhosts.hosts import SHOWN_CACHE, WHEELHOUSE
from mixtral_run.fleet.testhosts.image import host_image
from mixtral_run.fleet.testhosts.shell import call, succeeds

PACKAGE = Path(mixtral_run.__file__).parent
# Found in a checkout and in an installed wheel alike.
DOCKERFILE = provisioning_folder() / "roles/image/files/Dockerfile"
SBOM = DOCKERFILE.with_name("sbom.py")
LOCK = DOCKERFILE.with_name("locks") / "common.txt"
REQUIREMENTS = provisioning_folder() / "roles/image/files/requirements.txt"
CONSTRAINTS = provisioning_folder() / "constraints.txt"
LIGHT = ("click", "markdown-it-py", "mdurl", "numpy", "pygments", "pyyaml", "rich")
"""The packages that `mixtral-run --version` needs, and one with binaries. The image role's own scenario builds images
from them, by their hashes; a host of the end-to-end test builds the whole image from wheels."""
LIGHT_WHEELHOUSE = CACHE / "wheelhouse-light"
BASE = "mixtral-run-test-base:bookworm"
ARCHIVE_NAME = "mixtral-run:archive"
ARCHIVE_ON_HOST = f"{SHOWN_CACHE}/kit-image.tar"
LAYERS_ON_HOST = f"{SHOWN_CACHE}/kit-layers.tar"


def pinned(names: tuple[str, ...] | None = LIGHT) -> list[str]:
    """Return the lines of the role's lock for these packages, with hashes. None: all requirements, without hashes."""
    if names is None:
        return [line for line in REQUIREMENTS.read_text().splitlines() if line and not line.startswith("#")]
    lines = LOCK.read_text().replace("\\\n", "").splitlines()
    return [" ".join(line.split()) for line in lines if line.split("==")[0] in names]


def fill_wheelhouse(names: tuple[str, ...] | None = None) -> Path:
    """Download wheels once, for Debian 12's Python; torch for the CPU if pip finds it.

    names: packages of the role's lock, for LIGHT_WHEELHOUSE; None: the whole image, for WHEELHOUSE.
    """
    folder = WHEELHOUSE if names is None else LIGHT_WHEELHOUSE
    recipe = "\n".join([*pinned(names), _constraints()]).encode()
    marker = folder / f".complete-{hashlib.sha256(recipe).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not marker.exists():
            folder.mkdir(parents=True, exist_ok=True)
            # Not removed and made anew: hosts that run have it mounted.
            for old in folder.iterdir():
                old.unlink()
            # pip takes hashes from files only.
            wanted = CACHE / f"{folder.name}.txt"
            wanted.write_text("\n".join(pinned(names)) + "\n")
            call(
                sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--dest", folder,
                "--python-version", "3.11", *(("--constraint", CONSTRAINTS) if CONSTRAINTS.is_file() else ()),
                "--requirement", wanted,
            )  # fmt: skip
            marker.touch()
    return folder


def _constraints() -> str:
    return CONSTRAINTS.read_text() if CONSTRAINTS.is_file() else ""


def dependencies() -> str:
    """Return the name of an image with all that the kit's image holds but the kit; build it unless the engine has it.

    Its layers are those of the finished image below the kit's own: a new version of the kit leaves them as they are.
    """
    below, _ = _halves_of_dockerfile()
    recipe = "\n".join([below, *pinned(None), LOCK.read_text(), host_image("bookworm"), _constraints()])
    name = f"mixtral-run-test-dependencies:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    with (CACHE / "dependencies.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not succeeds("docker", "image", "inspect", name):
            older = call("docker", "image", "ls", "--quiet", name.split(":")[0]).split()
            if older:
                call("docker", "image", "rm", "--force", *older, check=False)
            _build_dependencies(name, below)
    return name


def image_archive() -> Path:
    """Write `docker save` of an image in which every verb runs; hosts see it at ARCHIVE_ON_HOST. Loads as ARCHIVE_NAME.

    Built by this machine's engine, once for each state of the kit. LAYERS_ON_HOST is the same without the layers of
    `dependencies()`, for hosts whose disk has them (`disks.py`): an engine takes it in a second.
    """
    below = dependencies()
    kit = sorted(path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc")
    # Not its name: one that is built again has other layers.
    identity = call("docker", "image", "inspect", "--format", "{{.Id}}", below)
    contents = [f"{path.relative_to(PACKAGE)} ".encode() + path.read_bytes() for path in kit]
    contents += [path.read_bytes() for path in (DOCKERFILE, SBOM)]
    recipe = hashlib.sha256(b"".join([identity.encode(), *contents])).hexdigest()[:12]
    archive, layers = CACHE / f"kit-image-{recipe}.tar", CACHE / f"kit-layers-{recipe}.tar"
    with (CACHE / "kit-image.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (archive.exists() and layers.exists()):
            for old in (*CACHE.glob("kit-image-*.tar"), *CACHE.glob("kit-layers-*.tar")):
                old.unlink()
            _build_kit(below)
            unfinished = archive.with_suffix(".partial")
            call("docker", "save", "--output", unfinished, ARCHIVE_NAME)
            _write_upper_layers(unfinished, layers, _num_layers(below))
            unfinished.rename(archive)
        for file, name in ((archive, ARCHIVE_ON_HOST), (layers, LAYERS_ON_HOST)):
            _link(CACHE / Path(name).name, file.name)
    return archive


def _link(link: Path, name: str) -> None:
    if not link.is_symlink() or link.readlink() != Path(name):
        link.unlink(missing_ok=True)
        link.symlink_to(name)


def _halves_of_dockerfile() -> tuple[str, str]:
    """Return what the image role's Dockerfile does before it copies the kit, and from there on, as two Dockerfiles."""
    lines = DOCKERFILE.read_text().splitlines()
    split = next(number for number, line in enumerate(lines) if line.startswith("COPY mixtral_run/"))
    last_stage = max(number for number, line in enumerate(lines) if line.startswith("FROM "))
    arguments = [line for line in lines[last_stage:split] if line.startswith("ARG ")]
    upper = ["ARG DEPENDENCIES", "FROM ${DEPENDENCIES}", *arguments, *lines[split:]]
    return "\n".join(lines[:split]) + "\n", "\n".join(upper) + "\n"


def _build_dependencies(name: str, dockerfile: str) -> None:
    call("docker", "tag", host_image("bookworm"), BASE)
    wheelhouse = fill_wheelhouse()
    with tempfile.TemporaryDirectory(prefix="mixtral-run-context-") as folder:
        context = Path(folder)
        (context / "Dockerfile").write_text(dockerfile)
        (context / "requirements.txt").write_text("\n".join(pinned(None)) + "\n")
        (context / "locks").mkdir()
        shutil.copy(LOCK, context / "locks")
        (context / "ca").mkdir()
        (context / "ca/README.txt").touch()
        shutil.copytree(wheelhouse, context / "wheelhouse")
        arguments = ("--build-arg", f"BASE_IMAGE={BASE}", "--build-arg", f"LOCKS={LOCK.stem}")
        call("docker", "build", "--tag", name, *arguments, folder)


def _build_kit(below: str) -> None:
    with tempfile.TemporaryDirectory(prefix="mixtral-run-context-") as folder:
        context = Path(folder)
        (context / "Dockerfile").write_text(_halves_of_dockerfile()[1])
        shutil.copy(SBOM, context)
        shutil.copytree(PACKAGE, context / "mixtral_run", ignore=shutil.ignore_patterns("__pycache__"))
        call("docker", "build", "--tag", ARCHIVE_NAME, "--build-arg", f"DEPENDENCIES={below}", folder)


def _num_layers(image: str) -> int:
    return int(call("docker", "image", "inspect", "--format", "{{len .RootFS.Layers}}", image))


def _write_upper_layers(archive: Path, target: Path, num_below: int) -> None:
    """Write an archive of `docker save` again without its lowest layers; an engine that has them loads it as it is."""
    unfinished = target.with_suffix(".partial")
    with tarfile.open(archive) as whole, tarfile.open(unfinished, "w") as upper:
        manifest = whole.extractfile("manifest.json")
        assert manifest is not None
        (image,) = json.load(manifest)
        below = set(image["Layers"][:num_below])
        for member in whole:
            if member.name not in below:
                upper.addfile(member, whole.extractfile(member) if member.isreg() else None)
    unfinished.rename(target)
