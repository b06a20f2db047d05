"""Packages with the names and versions of NVIDIA's driver repository, DCGM included, for test hosts without a GPU.

STAND-IN: they have no driver in them. Their dependencies, the pinning packages and the styles of revisions are those of
NVIDIA's repository for Debian; a "module" is a file with a version, which `files/driver/kernel-modules` loads.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from mixtral_run.fleet.testhosts.image import FILES
from mixtral_run.fleet.testhosts.shell import call

PLACE = "cuda/debian12/x86_64"
"""Folder of the flat repository."""
VERSIONS = {"580.95.05": "-1", "580.173.02": "-1", "595.71.05": "-1ubuntu1"}
"""Versions of the driver and the styles of their revisions."""
FILES_USED = ("kernel-modules", "dkms", "nv-fabricmanager")
UNIT = "[Unit]\nDescription=STAND-IN\n[Service]\nExecStart={}\n[Install]\nWantedBy=multi-user.target\n"
BUILD = """#!/bin/sh
# As NVIDIA's packages do, it ends with 0 even if nothing was built.
for kernel in "$(uname -r)" $(ls /boot/vmlinuz-* 2>/dev/null | sed 's,.*/vmlinuz-,,'); do
    /usr/sbin/dkms autoinstall -k "$kernel" || true
done
"""
UNBUILD = (
    "#!/bin/sh\nrm -f /usr/lib/modules/*/updates/dkms/nvidia.ko\nrmdir -p /usr/lib/modules/*/updates/dkms || true\n"
)
HEADERS = '#!/bin/sh\nmkdir -p "/usr/lib/modules/$(uname -r)/build"\n'
NO_HEADERS = '#!/bin/sh\nrmdir -p "/usr/lib/modules/$(uname -r)/build" 2>/dev/null || true\n'


DCGM_VERSION = "1:4.6.0-1"


@dataclass(frozen=True)
class Package:
    """One package: its control fields, files by path with their texts, and maintainer scripts."""

    name: str
    version: str
    fields: str = ""
    files: dict[str, str] = field(default_factory=dict)
    scripts: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)


def build_packages(pool: Path) -> None:
    """Write all packages into an empty folder."""
    for package in _packages():
        with tempfile.TemporaryDirectory() as work:
            _build(Path(work), pool, package)


def _packages() -> list[Package]:
    dkms = {"usr/sbin/dkms": (FILES / "driver/dkms").read_text()}
    found = [
        Package("dkms", "99", files=dkms),
        Package("linux-headers-amd64", "99", scripts={"postinst": HEADERS, "prerm": NO_HEADERS}),
        Package("nvidia-driver-pinning-580", "580.173.02-1", *_pinning("580")),
    ]
    for version, revision in VERSIONS.items():
        found += _driver(version, version + revision)
    return found + _dcgm()


def _dcgm() -> list[Package]:
    """Return DCGM and its exporter. As NVIDIA's, no script of theirs starts, stops or disables a service."""
    unit = "usr/lib/systemd/system/{}.service"
    engine, exporter = UNIT.format("/usr/bin/nv-hostengine"), UNIT.format("/usr/bin/dcgm-exporter")
    program = "#!/bin/sh\n# STAND-IN\nexec sleep infinity\n"
    core = f"Depends: datacenter-gpu-manager-4-core (= {DCGM_VERSION})\n"
    return [
        Package("datacenter-gpu-manager-4-core", DCGM_VERSION, "", {
            "usr/bin/nv-hostengine": program, unit.format("nvidia-dcgm"): engine}),
        Package("datacenter-gpu-manager-4-cuda13", DCGM_VERSION, core),
        Package("datacenter-gpu-manager-exporter", "4.8.4-1", "Depends: datacenter-gpu-manager-4-core\n", {
            "usr/bin/dcgm-exporter": program, unit.format("nvidia-dcgm-exporter"): exporter}),
    ]  # fmt: skip


def _pinning(beginning: str) -> tuple[str, dict[str, str]]:
    """Return control fields and files of a pinning package. It pins all other packages of the driver."""
    names = "nvidia-driver-cuda nvidia-kernel-open-dkms nvidia-persistenced nvidia-fabricmanager libnvidia-ml1"
    text = f"Package: {names}\nPin: version {beginning}*\nPin-Priority: 1000\n"
    fields = "Provides: nvidia-driver-pinning\nConflicts: nvidia-driver-pinning\n"
    return fields, {"etc/apt/preferences.d/nvidia-driver-pinning": text}


def _driver(version: str, full: str) -> list[Package]:
    library = f"usr/lib/x86_64-linux-gnu/libnvidia-ml.so.{version}"
    manager = (FILES / "driver/nv-fabricmanager").read_text().replace("@VERSION@", version)
    source = {f"usr/src/nvidia-{version}/dkms.conf": "STAND-IN\n"}
    units = "usr/lib/systemd/system/{}.service"
    return [
        Package(f"nvidia-driver-pinning-{version}", full, *_pinning(version)),
        Package("libnvidia-ml1", full, files={library: "STAND-IN\n"}, links={
            "usr/lib/x86_64-linux-gnu/libnvidia-ml.so.1": Path(library).name}),
        Package("nvidia-driver-cuda", full, f"Depends: libnvidia-ml1 (= {full})\n", {
            "usr/bin/nvidia-smi": (FILES / "nvidia-smi").read_text()}),
        Package("nvidia-kernel-open-dkms", full, "Depends: dkms\n", source, {"postinst": BUILD, "prerm": UNBUILD}),
        Package("nvidia-persistenced", full, "", {
            "usr/bin/nvidia-persistenced": "#!/bin/sh\n# STAND-IN\nexec sleep infinity\n",
            units.format("nvidia-persistenced"): UNIT.format("/usr/bin/nvidia-persistenced --no-persistence-mode")}),
        Package("nvidia-fabricmanager", full, "", {
            "usr/bin/nv-fabricmanager": manager,
            units.format("nvidia-fabricmanager"): UNIT.format("/usr/bin/nv-fabricmanager")}),
    ]  # fmt: skip


def _build(work: Path, pool: Path, package: Package) -> None:
    work.chmod(0o755)
    control = work / "DEBIAN"
    control.mkdir()
    (control / "control").write_text(
        f"Package: {package.name}\nVersion: {package.version}\nArchitecture: amd64\n"
        f"Maintainer: mixtral-run tests <tests@localhost>\n{package.fields}"
        f"Description: STAND-IN for {package.name}, for test hosts without a GPU\n"
    )
    for name, text in package.scripts.items():
        (control / name).write_text(text)
        (control / name).chmod(0o755)
    for place, text in package.files.items():
        path = work / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    for place, target in package.links.items():
        (work / place).symlink_to(target)
    call(
        "dpkg-deb",
        "--root-owner-group",
        "-b",
        work,
        pool / f"{package.name}_{package.version.rpartition(':')[2]}_amd64.deb",
    )
