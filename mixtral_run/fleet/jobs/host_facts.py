"""Facts about a host that are read before a job starts on it: the script that prints them, and their check."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mixtral_run.errors import ConfigError, HostError
from mixtral_run.fleet.host_folders import DEFAULT_FOLDERS, HostFolders
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.untrusted import one_line


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """Facts about a host that are read before a job starts on it."""

    docker: tuple[str, ...] = ("docker",)
    """Command for the engine: with sudo if the user is not in the group docker."""
    uid: int = 1000
    gid: int = 1000
    group_of_checkpoints: int | None = None
    folder: str = ""
    """Folder for the files of jobs, in the user's home folder."""
    kernels: str = ""
    """Folder for compiled kernels, in the user's home folder, where no other user can add code."""
    num_gpus: int = 0
    cdi: bool = False
    address: str = ""
    interface: str = ""
    """Address and interface of the default route. Other hosts cannot reach the bridge of a Docker engine."""
    rdma: tuple[str, ...] = ()
    """InfiniBand and RoCE devices with an active port, apart from those of the NVSwitches; empty without /dev nodes."""
    bridges: tuple[str, ...] = ()
    """Devices through which the fabric manager reaches the NVSwitches of a B200 or B300. They carry no data."""
    rdma_group: int | None = None
    """Group that may use the devices, unless everybody may."""
    folders: HostFolders = DEFAULT_FOLDERS
    """Folders of the host for the job."""


FIND_ENGINE = """
if docker version >/dev/null 2>&1; then docker=docker
elif sudo -n docker version >/dev/null 2>&1; then docker='sudo -n docker'
else
  if sudo -n true 2>/dev/null; then docker='sudo -n docker'; else docker=docker; fi
  echo "$(id -un): $($docker version 2>&1 >/dev/null | tail -n 1)" >&2; exit 3
fi
"""
"""Script that sets $docker to the command for the engine, or prints user and reason and exits with code 3."""

NO_ENGINE = 69
"""Exit code of NEEDS_ENGINE."""
NEEDS_ENGINE = f"""
command -v docker >/dev/null 2>&1 || sudo -n sh -c 'command -v docker' >/dev/null 2>&1 || exit {NO_ENGINE}
"""
"""Script that ends with code NO_ENGINE on a host that has no program `docker`, for this user or for root."""


class NoEngineError(HostError):
    """A host that has no Docker, and so no jobs. Lists show it as the state of the host."""

    def __init__(self, host: Host) -> None:
        super().__init__(
            f"{host.name} has no Docker: not bootstrapped.",
            where=host.target,
            found="docker: not found",
            next_command=f"mixtral-run bootstrap {host.bootstrap_arguments}",
        )
        self.host = host


FACTS_SCRIPT = (
    FIND_ENGINE
    + r"""
umask 077; mkdir -p "$HOME/.local/state/mixtral-run/jobs" "$HOME/.cache/mixtral-run/kernels" || exit 4
echo "docker=$docker"
echo "uid=$(id -u)"; echo "gid=$(id -g)"
echo "group=$(stat -c %g "$1" 2>/dev/null)"
echo "folder=$HOME/.local/state/mixtral-run/jobs"
echo "kernels=$HOME/.cache/mixtral-run/kernels"
echo "gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')"
if $docker info --format '{{json .}}' 2>/dev/null | grep -q 'nvidia\.com/gpu'; then echo cdi=1; else echo cdi=0; fi
if $docker image inspect "$2" >/dev/null 2>&1; then echo image=1; else echo image=0; fi
if [ -d "$1" ]; then echo checkpoints=1; else echo checkpoints=0; fi
if [ -e "$3" ]; then printf 'cordon=1 %s\n' "$(head -c 4000 "$3" | tr -d '\n')"; else echo cordon=; fi
route=$(ip -4 route get 192.0.2.1 2>/dev/null)
echo "address=$(echo "$route" | sed -n 's/.* src \([^ ]*\).*/\1/p')"
echo "interface=$(echo "$route" | sed -n 's/.* dev \([^ ]*\).*/\1/p')"
s=; [ "$(id -u)" = 0 ] || ! sudo -n true 2>/dev/null || s='sudo -n'
rdma=; bridges=; node="$4/dev/infiniband/uverbs0"
for port in "$4"/sys/class/infiniband/*/ports/*; do
  grep -qs ACTIVE "$port/state" || continue
  device=${port%/ports/*}
  if $s grep -qs SW_MNG "$device/device/vpd"; then bridges="$bridges,${device##*/}"; else rdma="$rdma,${device##*/}"; fi
done
[ -e "$node" ] || { rdma=; bridges=; }
echo "rdma=${rdma#,}"; echo "bridges=${bridges#,}"
echo "rdma_group=$([ "$(stat -c %A "$node" 2>/dev/null | cut -c 9)" != - ] || stat -c %g "$node")"
"""
)
"""Script that prints all facts of a host.

Arguments: the checkpoints folder, the image, the record of a cordon; a folder in place of / for devices, or nothing.
"""


_NUMBER, _FOLDER, _FLAG, _DEVICES = r"[0-9]{1,10}", r"/[^\t]*", r"[01]", r"([\w.-]{1,32}(,[\w.-]{1,32}){0,63})?"
_FACT_PATTERNS = {
    "docker": r"docker|sudo -n docker", "uid": _NUMBER, "gid": _NUMBER, "group": rf"({_NUMBER})?", "folder": _FOLDER,
    "kernels": _FOLDER, "gpus": r"[0-9]{1,4}", "cdi": _FLAG, "image": _FLAG, "checkpoints": _FLAG,
    "cordon": r"(1 .{0,4000})?",
    # Other hosts of the job connect to this address.
    "address": r"([0-9]{1,3}(\.[0-9]{1,3}){3})?", "interface": r"[^\s/]{0,15}",
    "rdma": _DEVICES, "bridges": _DEVICES, "rdma_group": rf"({_NUMBER})?",
}  # fmt: skip
"""Form of every value that FACTS_SCRIPT prints."""


def parse_facts(text: str, folders: HostFolders = DEFAULT_FOLDERS) -> tuple[HostFacts, dict[str, str]]:
    """Parse the output of FACTS_SCRIPT and return the facts and the values by name.

    Raises ValueError if a value is missing or not in the form that the script prints: the host is not trusted.
    """
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    for name, pattern in _FACT_PATTERNS.items():
        if name not in lines:
            raise ValueError(f"no value of {name}")
        if not re.fullmatch(pattern, lines[name]):
            raise ValueError(f"{name}={one_line(lines[name])!r}")
    facts = HostFacts(
        docker=tuple(lines["docker"].split()),
        uid=int(lines["uid"]),
        gid=int(lines["gid"]),
        group_of_checkpoints=int(lines["group"]) if lines["group"] else None,
        folder=lines["folder"],
        kernels=lines["kernels"],
        num_gpus=int(lines["gpus"]),
        cdi=lines["cdi"] == "1",
        address=lines["address"],
        interface=lines["interface"],
        rdma=_devices(lines["rdma"]),
        bridges=_devices(lines["bridges"]),
        rdma_group=int(lines["rdma_group"]) if lines["rdma_group"] else None,
        folders=folders,
    )
    return facts, lines


def _devices(text: str) -> tuple[str, ...]:
    """Return the names in a list with commas. A device with several active ports is listed for each of them."""
    return tuple(dict.fromkeys(name for name in text.split(",") if name))


def check_same_gpus(facts: Sequence[HostFacts], names: Sequence[str]) -> None:
    """Raise ConfigError if the hosts of one job have different numbers of GPUs."""
    if len({each.num_gpus for each in facts}) > 1:
        raise ConfigError(
            "The hosts of one job must have the same number of GPUs.",
            problems=[f"{name}: {each.num_gpus} GPUs" for name, each in zip(names, facts, strict=True)],
            next_command="--nproc-per-node N, to use N on each",
        )
