"""State of all hosts of a fleet, read in parallel over SSH, and the differences of a host from most others."""

from __future__ import annotations

import collections
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mixtral_run.errors import HostError
from mixtral_run.fleet.host_folders import folders_of
from mixtral_run.fleet.hosts import Host, shortened
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_problem, last_line
from mixtral_run.fleet.status.answer import check_answer
from mixtral_run.fleet.status.payload import status_payload
from mixtral_run.fleet.untrusted import parse_json

TIMEOUT_SECONDS = 120
DEFAULT_IMAGE = "mixtral-run:local"
"""The default of the role."""
LEAST_FREE_GIB = 100
HOT_CELSIUS = 85


@dataclass(frozen=True)
class HostStatus:
    """State of one host. Values that could not be read are None or empty."""

    name: str
    reachable: bool
    error: str | None = None
    os: str = ""
    kernel: str = ""
    driver: str = ""
    driver_error: str | None = None
    gpu_model: str = ""
    num_gpus: int = 0
    gpu_memory_gib: float = 0.0
    hottest_celsius: float = 0.0
    ecc_errors: int = 0
    xid_errors: tuple[str, ...] | None = ()
    """Lines of the kernel log; None if it could not be read."""
    fabric_manager: str = ""
    rdma: str = ""
    """Active InfiniBand and RoCE devices, and how they reach the memory of the GPUs; empty without devices."""
    engine: str = ""
    toolkit: str = ""
    gpus_by: str = ""
    """The way in which containers get GPUs: CDI, runtime, or empty."""
    image: str = ""
    swap_gib: float = 0.0
    ram_gib: float = 0.0
    disks: tuple[tuple[str, float], ...] = ()
    """(folder, free GiB)."""
    models: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    cordoned: str = ""
    """Who cordoned the host, when and why; empty if it takes jobs."""
    health: str = ""
    """What the last look of the health watch found; empty on a host without it."""
    acceptance: str = ""
    set_up: str = ""
    reimaged: bool | None = None
    """True if the host was reinstalled since it was set up; None if it never was set up."""
    unreadable: tuple[str, ...] = ()
    """Files and folders of the host that only root can read, where sudo asks for a password."""
    differences: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())


COMPARED: tuple[tuple[str, str], ...] = (
    ("os", "OS"), ("kernel", "kernel"), ("driver", "driver"), ("gpu_model", "GPU"), ("num_gpus", "GPUs"),
    ("gpu_memory_gib", "GPU memory GiB"), ("fabric_manager", "fabric manager"), ("rdma", "RDMA"), ("engine", "engine"),
    ("toolkit", "toolkit"), ("gpus_by", "GPUs by"), ("image", "image"), ("swap_gib", "swap GiB"), ("models", "models"),
    ("ram_gib", "RAM GiB"),
)  # fmt: skip
"""Fields that should be the same on all hosts of a fleet, and their titles."""


def read_fleet(
    hosts: Sequence[Host], ssh: Ssh | None = None, folders: Mapping[str, str] | None = None
) -> tuple[HostStatus, ...]:
    """Read the state of all hosts in parallel without changing anything.

    folders: `checkpoints`, `hf_home` and `image` in place of those of each host.

    A host that cannot be read, or that answers in an unexpected form, has an `error` and does not affect the others.
    """
    ssh = ssh or Ssh()
    payload = status_payload()

    def argument(host: Host) -> str:
        return json.dumps({**folders_of(host)._asdict(), "image": DEFAULT_IMAGE, **(folders or {})})

    return with_differences(ssh.each(hosts, lambda host: _read_host(ssh, host, payload, argument(host))))


def _read_host(ssh: Ssh, host: Host, payload: bytes, argument: str) -> HostStatus:
    # As root if sudo asks for no password: only root can read kernel messages and the files of other users.
    script = (
        "p=$(command -v python3) || exit 127; "
        'if sudo -n true 2>/dev/null; then exec sudo -n "$p" - "$1"; fi; exec "$p" - "$1"'
    )
    try:
        answer = ssh.run(host, ["sh", "-c", script, "status", argument], stdin=payload, timeout_seconds=TIMEOUT_SECONDS)
    except HostError as error:
        return HostStatus(host.name, reachable=False, error=str(error))
    if answer.exit_code == 255:
        return HostStatus(host.name, reachable=False, error=connection_problem(host, answer.errors))
    if answer.exit_code == 127 and not answer.output:
        return HostStatus(host.name, reachable=True, error="a bare host without python3", warnings=("not set up",))
    if answer.exit_code:
        found = last_line(answer.errors) or last_line(answer.output) or f"exit code {answer.exit_code}"
        return HostStatus(host.name, reachable=answer.exit_code != 124, error=f"its state cannot be read: {found}")
    try:
        return status_from(host, parse_json(answer.output))
    except ValueError as error:
        return HostStatus(host.name, reachable=True, error=f"its answer is not in the expected form: {error}")


def status_from(host: Host, values: Any) -> HostStatus:
    """Return a host's state from the JSON values that `remote_status` printed. Raises ValueError for any other form."""
    found = check_answer(values)
    gpus, engine, fabric = found["gpus"], found["engine"], found["fabric_manager"]
    acceptance = found["acceptance"]
    return HostStatus(
        name=host.name,
        reachable=True,
        os=found["os"]["name"],
        kernel=found["kernel"],
        driver=found["driver"]["user"] or "",
        driver_error=found["driver"]["error"],
        gpu_model=", ".join(sorted({gpu["name"] for gpu in gpus})),
        num_gpus=len(gpus),
        gpu_memory_gib=min((gpu["memory_gib"] for gpu in gpus), default=0.0),
        hottest_celsius=max((gpu["temperature_celsius"] for gpu in gpus), default=0.0),
        ecc_errors=int(sum(gpu["ecc_errors"] for gpu in gpus)),
        xid_errors=None if found["xid_errors"] is None else tuple(found["xid_errors"]),
        fabric_manager=_fabric_manager(fabric),
        rdma=_rdma(found["rdma"]),
        engine=engine["version"] or "",
        toolkit=found["toolkit"] or "",
        gpus_by="CDI"
        if engine["cdi_devices"] or found["cdi"]["gpus"]
        else "runtime"
        if "nvidia" in engine["runtimes"]
        else "",
        image=_image(found["image"]),
        swap_gib=round(sum(swap["size_gib"] for swap in found["swap"]), 1),
        ram_gib=found["memory"]["ram_gib"],
        disks=tuple((disk["path"], disk["free_gib"]) for disk in found["disks"]),
        models=tuple(found["models"]),
        checkpoints=tuple(entry["path"] for entry in found["checkpoints"]),
        adapters=tuple(f"{entry['path']} (iteration {entry['iteration']})" for entry in found["adapters"]),
        jobs=tuple(f"{job['name']} ({job['verb']}, {job['since']})" for job in found["jobs"]),
        cordoned=str(found["cordon"] or ""),
        health=str(found["health"] or ""),
        acceptance=_acceptance(acceptance["report"]),
        set_up=acceptance["at"],
        reimaged=_reimaged(acceptance["identity"], found["identity"]),
        unreadable=tuple(found["unreadable"]),
        warnings=_warnings(host, found),
    )


def _fabric_manager(fabric: Mapping[str, Any]) -> str:
    if not fabric["nvswitch"]:
        return ""
    return f"{fabric['version'] or '?'}{'' if fabric['active'] else ' (not running)'}"


def _rdma(rdma: Mapping[str, Any] | None) -> str:
    if rdma is None or not rdma["devices"]:
        return ""
    counts = collections.Counter(f"{each['link_layer']} {each['rate']}".strip() for each in rdma["devices"])
    parts = [f"{count} × {words}" for words, count in sorted(counts.items())]
    return ", ".join([*parts, rdma["gpudirect"] or "without GPUDirect"])


def _image(image: Mapping[str, Any] | None) -> str:
    if not image:
        return ""
    digests = image["digests"]
    return str(digests[0].rsplit("@", 1)[-1] if digests else image["inputs"] or image["id"]).removeprefix("sha256:")[
        :12
    ]


def _reimaged(recorded: Mapping[str, Any], identity: Mapping[str, str]) -> bool | None:
    # A reimaged host has an empty disk and no record. A host restored from a disk image has the record of another one.
    if not recorded:
        return None
    return any(recorded.get(key) not in (None, "", identity.get(key)) for key in ("machine_id", "ssh_host_key"))


def _acceptance(report: Mapping[str, Any]) -> str:
    """Return the report of the acceptance in one line: its result and every number at its top level."""
    figures = report.get("figures") if isinstance(report.get("figures"), dict) else report
    assert isinstance(figures, Mapping)
    numbers = [
        f"{name.replace('_', ' ')} {shown(value)}"
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]
    if not report:
        return ""
    return ", ".join(["accepted" if report.get("accepted") else "not accepted", *numbers])


def _warnings(host: Host, found: Mapping[str, Any]) -> tuple[str, ...]:
    driver, engine, gpus = found["driver"], found["engine"], found["gpus"]
    warnings = [str(found["cordon"])] if found["cordon"] is not None else []
    warnings += found["health"].warnings if found["health"] is not None else []
    if driver["error"]:
        warnings.append(driver["error"])
    if driver["kernel"] and driver["user"] and driver["kernel"] != driver["user"]:
        warnings.append(f"driver: kernel module {driver['kernel']}, library {driver['user']}: reboot")
    if engine["error"]:
        warnings.append(engine["error"])
    fabric = found["fabric_manager"]
    if fabric["nvswitch"] and (not fabric["active"] or (driver["user"] and fabric["version"] != driver["user"])):
        warnings.append(f"fabric manager {_fabric_manager(fabric)}, driver {driver['user']}: CUDA will fail")
    warnings += found["gpu_remarks"]
    warnings += [
        f"{disk['path']}: {disk['free_gib']:g} GiB free"
        for disk in found["disks"][:1]
        if disk["free_gib"] < LEAST_FREE_GIB
    ]
    warnings += [
        f"GPU {gpu['index']} at {gpu['temperature_celsius']:g} °C"
        for gpu in gpus
        if gpu["temperature_celsius"] >= HOT_CELSIUS
    ]
    warnings += [
        f"GPU {gpu['index']}: {gpu['ecc_errors']:g} uncorrectable ECC errors" for gpu in gpus if gpu["ecc_errors"]
    ]
    if found["unreadable"]:
        warnings.append(_unreadable(host, found["unreadable"]))
    if found["xid_errors"] is None and gpus:
        warnings.append("Xid errors cannot be read: that needs root, and sudo asks for a password")
    elif found["xid_errors"]:
        warnings.append(f"{len(found['xid_errors'])} Xid errors: {found['xid_errors'][-1]}")
    if engine["version"] and not found["image"]:
        warnings.append("the kit's image is missing")
    return tuple(_of_several_gpus(warnings))


def _unreadable(host: Host, paths: Sequence[str]) -> str:
    """Return the warning for paths that only root can read, with the command that helps."""
    records = [path for path in paths if path.endswith(".json")]
    # `bootstrap` writes the record of the acceptance so that every user can read it. Folders belong to their owner.
    if records == list(paths):
        command = f"mixtral-run bootstrap {host.bootstrap_arguments} --ask-become-pass"
    else:
        command = host.ssh_command("-t", command=shlex.join(["sudo", "ls", "-ld", *paths[:8]]))
    return f"not readable: {shortened(paths)}: that needs root, and sudo asks for a password; next: {command}"


def _of_several_gpus(warnings: Sequence[str]) -> list[str]:
    """Return the warnings with one line for those that differ by the number of a GPU only."""
    found: dict[tuple[str, str], list[str]] = {}
    for warning in warnings:
        parts = re.fullmatch(r"((?:health: )?)GPU (\d+)((?::| at ).*)", warning, re.DOTALL)
        found.setdefault((parts[1], parts[3]) if parts else (warning, ""), []).extend([parts[2]] if parts else [])
    return [
        f"{before}GPU{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}{after}" if numbers else before
        for (before, after), numbers in found.items()
    ]


def with_differences(statuses: Sequence[HostStatus]) -> tuple[HostStatus, ...]:
    """Return the states with the fields in which a host differs from most others. Without a majority, none differs."""
    read = [status for status in statuses if status.reachable and status.error is None]
    usual: dict[str, Any] = {}
    for name, _ in COMPARED:
        counted = collections.Counter(getattr(status, name) for status in read)
        if counted:
            value, count = counted.most_common(1)[0]
            if count * 2 > len(read):
                usual[name] = value
    return tuple(_differing(status, usual) if status in read else status for status in statuses)


def _differing(status: HostStatus, usual: Mapping[str, Any]) -> HostStatus:
    found = []
    for name, words in COMPARED:
        own = getattr(status, name)
        if name in usual and own != usual[name]:
            found.append(f"{words}: {shown(own)} (most: {shown(usual[name])})")
    return replace(status, differences=tuple(found))


def shown(value: Any) -> str:
    """Return a value as text for a table."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in ("", None) else "none"


def to_json(statuses: Sequence[HostStatus]) -> str:
    """Return the statuses as a JSON list."""
    return json.dumps([asdict(status) for status in statuses], indent=2, ensure_ascii=False) + "\n"


def summary_rows(statuses: Sequence[HostStatus]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns and rows of the table for a terminal."""
    columns: tuple[str, ...] = (
        "host",
        "GPUs",
        "driver",
        "engine",
        "image",
        "free GiB",
        "jobs",
        "what differs or warns",
    )
    rows: list[tuple[str, ...]] = []
    for status in statuses:
        remarks = (status.error,) if status.error else status.warnings + status.differences
        state = "✗" if not status.reachable else "!" if remarks or status.reimaged else "✓"
        rows.append(
            (
                f"{state} {status.name}",
                f"{status.num_gpus} × {status.gpu_model}" if status.num_gpus else "",
                status.driver,
                status.engine,
                status.image,
                f"{status.disks[0][1]:g}" if status.disks else "",
                ", ".join(status.jobs),
                "; ".join([*(["reimaged since it was set up"] if status.reimaged else []), *filter(None, remarks)]),
            )
        )
    return columns, rows
