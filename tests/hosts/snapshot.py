"""Packages and files of a throw-away host, so that a test can compare the host before and after."""

from __future__ import annotations

from mixtral_run.fleet.testhosts.hosts import Host

# What a host writes by itself, and what package managers and logins leave behind on every host.
UNSTEADY = (
    "/proc", "/sys", "/dev", "/run", "/tmp", "/var/tmp", "/var/log", "/var/cache", "/var/lib/apt", "/var/lib/dpkg",
    "/var/lib/systemd", "/home/ops/.ansible", "/home/ops/.cache", "/home/ops/.local", "/etc/ld.so.cache",
    "/etc/mtab", "/etc/group-", "/etc/gshadow-", "/opt/test-cache",
    # Images, containers and volumes stay.
    "/var/lib/docker", "/var/lib/containerd",
    # A data disk is not the host's.
    "/mnt/data",
)  # fmt: skip
# Path, type, mode, owner, group, target of a link; then the digests of the files that are not a package's own.
FILES = r"""
find / \( {prune} \) -prune -o -name __pycache__ -prune -o -printf '%p\t%y %m %u:%g %l\n'
find /etc /root /home /srv /opt /usr/local /boot \( {prune} \) -prune -o -type f -print0 | xargs -0 sha256sum | \
    sed 's/^\([0-9a-f]*\)  \(.*\)/\2\tsha256 \1/'
"""
PACKAGES = r"""
dpkg-query --show --showformat='package ${binary:Package}\t${Version} ${db:Status-Status}\n'
apt-mark showhold | sed 's/$/\theld/'
"""


def snapshot(host: Host) -> set[str]:
    """Return a line for each package, each file with mode and owner, and each digest."""
    prune = " -o ".join(f"-path {path}" for path in UNSTEADY)
    return set(host.shell(FILES.format(prune=prune)).splitlines()) | set(host.shell(PACKAGES).splitlines())


def difference(before: set[str], after: set[str]) -> list[str]:
    """Return what went (-) and what came (+), sorted by path."""
    lines = [f"- {line}" for line in before - after] + [f"+ {line}" for line in after - before]
    return sorted(lines, key=lambda line: (line[2:], line[0]))
