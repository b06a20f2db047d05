"""A small signed apt repository with packages of the upstream names, served to the test hosts.

STAND-IN: the upstream servers cannot be reached from everywhere that tests run. docker-ce and its companions are
Debian's real engine repacked; the toolkit's four packages hold stand-ins for nvidia-ctk, the runtime and the hook.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixtral_run.fleet.testhosts import driver_packages
from mixtral_run.fleet.testhosts.engine import CACHE, install_packages
from mixtral_run.fleet.testhosts.hosts import LABEL, running
from mixtral_run.fleet.testhosts.image import FILES, host_image
from mixtral_run.fleet.testhosts.shell import TargetError, call, succeeds

CONTAINER = f"mixtral-run-repository-{LABEL.split('=')[1]}"
PORT = 8000
TOOLKIT_VERSIONS = ("1.17.8-1", "1.18.1-1")
TOOLKIT_PACKAGES = {
    "libnvidia-container1": (),
    "libnvidia-container-tools": ("libnvidia-container1",),
    "nvidia-container-toolkit-base": (),
    "nvidia-container-toolkit": ("nvidia-container-toolkit-base", "libnvidia-container-tools"),
}


@dataclass(frozen=True)
class Repository:
    """Where the test hosts find the repository, and the key that signs it."""

    url: str
    fingerprint: str
    folder: Path

    def variables(self) -> dict[str, object]:
        """The roles' mirror variables that point at this repository."""
        return {
            "docker_repository_url": f"{self.url}/linux/debian",
            "docker_repository_key_url": f"{self.url}/linux/debian/gpg",
            "docker_repository_key_fingerprint": self.fingerprint,
            "nvidia_driver_repository_url": f"{self.url}/{driver_packages.PLACE}",
            "nvidia_driver_repository_key_url": f"{self.url}/{driver_packages.PLACE}/key.pub",
            "nvidia_driver_repository_key_fingerprint": self.fingerprint,
            "nvidia_container_toolkit_repository_url": f"{self.url}/libnvidia-container/stable/deb/$(ARCH)",
            "nvidia_container_toolkit_repository_key_url": f"{self.url}/libnvidia-container/gpgkey",
            "nvidia_container_toolkit_repository_key_fingerprint": self.fingerprint,
        }


def serve(releases: tuple[str, ...] = ("bookworm",)) -> Repository:
    """Build what is missing and serve it from a container; returns where it is. Calling again changes nothing.

    One server serves all hosts of this checkout. Start the host before: what it is for, or `stop_unless_used` of others
    ends it.
    """
    with _locked():
        folder = CACHE / f"repository-{_recipe()}"
        folder.mkdir(exist_ok=True)
        fingerprint = _key(folder)
        for release in releases:
            _build_docker(folder, release)
        _build_toolkit(folder)
        _build_driver(folder)
        if not succeeds("docker", "exec", CONTAINER, "test", "-e", f"/srv/{folder.name}"):
            _start_server()
    address = call("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", CONTAINER).strip()
    return Repository(f"http://{address}:{PORT}/{folder.name}", fingerprint, folder)


def stop() -> None:
    """Remove the server; what it serves stays in CACHE."""
    call("docker", "rm", "--force", CONTAINER, check=False)


def stop_unless_used() -> None:
    """Remove the server where this checkout has no host left: whoever removes the last one calls this."""
    with _locked():
        try:
            used = bool(running())
        except TargetError:  # no engine answers any more, and with it the server is gone
            return
        if not used:
            stop()


@contextmanager
def _locked() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "repository.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _recipe() -> str:
    names = (
        "repack.sh",
        "nvidia-ctk",
        "nvidia-container-runtime",
        "nvidia-container-runtime-hook",
        "libcuda_standin.c",
        "nvidia-cdi-refresh.service",
        "nvidia-smi",
        *(f"driver/{name}" for name in driver_packages.FILES_USED),
    )
    text = b"".join((FILES / name).read_bytes() for name in names) + Path(__file__).read_bytes()
    text += Path(driver_packages.__file__).read_bytes()
    return hashlib.sha256(text).hexdigest()[:12]


def _start_server() -> None:
    stop()
    call(
        "docker", "run", "--detach", "--name", CONTAINER, "--label", "mixtral-run-repository",
        "--volume", f"{CACHE}:/srv:ro",
        host_image("bookworm"), "python3", "-m", "http.server", str(PORT), "--directory", "/srv",
    )  # fmt: skip
    time.sleep(1)


def _gpg(*words: str | Path) -> str:
    home = CACHE / "gnupg"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    return call("gpg", "--homedir", home, "--batch", "--yes", *words)


def _key(folder: Path) -> str:
    """The throw-away signing key; its public half is put where the upstream servers have theirs."""
    install_packages("gnupg")
    if "fpr" not in _gpg("--list-keys", "--with-colons"):
        _gpg(
            "--passphrase",
            "",
            "--quick-generate-key",
            "mixtral-run tests <tests@localhost>",
            "rsa2048",
            "sign",
            "never",
        )
    fingerprint = next(
        line.split(":")[9] for line in _gpg("--list-keys", "--with-colons").splitlines() if line.startswith("fpr")
    )
    places = ("linux/debian/gpg", "libnvidia-container/gpgkey", f"{driver_packages.PLACE}/key.pub")
    for path in (folder / place for place in places):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_gpg("--armor", "--export"))
    return fingerprint


def _build_docker(folder: Path, release: str) -> None:
    base = folder / "linux/debian"
    pool = base / "pool" / release
    index = base / "dists" / release
    if (index / "InRelease").exists():
        return
    shutil.rmtree(pool, ignore_errors=True)
    pool.mkdir(parents=True)
    call(
        "docker", "run", "--rm", "--volume", f"{pool}:/out", "--volume", f"{FILES}:/files:ro", host_image(release),
        "sh", "/files/repack.sh", "/out",
    )  # fmt: skip
    packages = index / "stable/binary-amd64/Packages"
    packages.parent.mkdir(parents=True, exist_ok=True)
    packages.write_text(_index(base, sorted(pool.glob("*.deb"))))
    header = f"Origin: STAND-IN\nSuite: {release}\nCodename: {release}\nComponents: stable\nArchitectures: amd64\n"
    _sign(index, header, [packages])


def _build_toolkit(folder: Path) -> None:
    base = folder / "libnvidia-container/stable/deb/amd64"
    if (base / "InRelease").exists():
        return
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    install_packages("gcc", "libc6-dev")
    for version in TOOLKIT_VERSIONS:
        for name, needs in TOOLKIT_PACKAGES.items():
            with tempfile.TemporaryDirectory() as work:
                _toolkit_package(Path(work), base, name, version, needs)
    packages = base / "Packages"
    packages.write_text(_index(base, sorted(base.glob("*.deb"))))
    _sign(base, "Origin: STAND-IN\n", [packages])


def _build_driver(folder: Path) -> None:
    base = folder / driver_packages.PLACE
    if (base / "InRelease").exists():
        return
    for archive in base.glob("*.deb"):
        archive.unlink()
    driver_packages.build_packages(base)
    packages = base / "Packages"
    packages.write_text(_index(base, sorted(base.glob("*.deb"))))
    _sign(base, "Origin: STAND-IN\n", [packages])


def _toolkit_package(work: Path, pool: Path, name: str, version: str, needs: tuple[str, ...]) -> None:
    contents: dict[str, tuple[str, ...]] = {
        "nvidia-container-toolkit": ("nvidia-container-runtime", "nvidia-container-runtime-hook"),
        "nvidia-container-toolkit-base": ("nvidia-ctk",),
    }
    (work / "DEBIAN").mkdir()
    work.chmod(0o755)
    depends = "".join(f"Depends: {', '.join(f'{need} (= {version})' for need in needs)}\n" if needs else "")
    (work / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: mixtral-run tests <tests@localhost>\n"
        f"{depends}Description: STAND-IN for NVIDIA's {name}, for test hosts without a GPU\n"
    )
    for program in contents.get(name, ()):
        target = work / "usr/bin" / program
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(FILES / program, target)
        target.chmod(0o755)
    if name == "nvidia-container-toolkit-base" and version >= "1.18":
        unit = work / "usr/lib/systemd/system/nvidia-cdi-refresh.service"
        unit.parent.mkdir(parents=True)
        shutil.copy(FILES / unit.name, unit)
        at_boot = unit.parent / "multi-user.target.wants" / unit.name
        at_boot.parent.mkdir()
        at_boot.symlink_to(f"../{unit.name}")
    if name == "nvidia-container-toolkit":
        library = work / "usr/lib/mixtral-run-standin/libcuda.so.1"
        library.parent.mkdir(parents=True)
        call("gcc", "-shared", "-fPIC", "-O1", "-o", library, FILES / "libcuda_standin.c")
    call("dpkg-deb", "--root-owner-group", "-b", work, pool / f"{name}_{version}_amd64.deb")


def _index(base: Path, archives: list[Path]) -> str:
    entries = []
    for archive in archives:
        control = call("dpkg-deb", "--field", archive).strip()
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        place = archive.relative_to(base)
        entries.append(f"{control}\nFilename: {place}\nSize: {archive.stat().st_size}\nSHA256: {digest}\n")
    return "\n".join(entries)


def _sign(folder: Path, header: str, files: list[Path]) -> None:
    lines = [
        f" {hashlib.sha256(file.read_bytes()).hexdigest()} {file.stat().st_size} {file.relative_to(folder)}\n"
        for file in files
    ]
    date = time.strftime("%a, %d %b %Y %H:%M:%S UTC", time.gmtime())
    release = folder / "Release"
    release.write_text(f"{header}Date: {date}\nSHA256:\n{''.join(lines)}")
    _gpg("--clearsign", "--output", folder / "InRelease", release)
