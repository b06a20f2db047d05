"""What every host has, read in parallel over SSH, and in what one differs from most of the others."""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mixtral_run.errors import HostError
from mixtral_run.fleet.hosts import Host
from mixtral_run.fleet.ssh.connection import Ssh
from mixtral_run.fleet.ssh.problems import connection_error, last_line
from mixtral_run.fleet.status.payload import status_payload

TIMEOUT_SECONDS = 120
DEFAULT_FOLDERS = {
    "checkpoints": "/var/lib/mixtral-run/checkpoints",
    "hf_home": "/var/lib/mixtral-run/huggingface",
    "image": "mixtral-run:local",
}
"""As the roles' defaults name them."""
LEAST_FREE_GIB = 100
HOT_CELSIUS = 85


@dataclass(frozen=True)
class HostStatus:
    """One host, as it was read. What could not be read is None or empty."""

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
    """None where they could not be read."""
    fabric_manager: str = ""
    engine: str = ""
    toolkit: str = ""
    gpus_by: str = ""
    """How containers get GPUs: CDI, runtime, or nothing."""
    image: str = ""
    swap_gib: float = 0.0
    ram_gib: float = 0.0
    disks: tuple[tuple[str, float], ...] = ()
    """(folder, free GiB)."""
    models: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()
    acceptance: str = ""
    set_up: str = ""
    reimaged: bool | None = None
    """Whether the host was installed anew since it was set up; None where it never was."""
    differences: tuple[str, ...] = field(default=())
    warnings: tuple[str, ...] = field(default=())


COMPARED: tuple[tuple[str, str], ...] = (
    ("os", "OS"), ("kernel", "kernel"), ("driver", "driver"), ("gpu_model", "GPU"), ("num_gpus", "GPUs"),
    ("gpu_memory_gib", "GPU memory GiB"), ("fabric_manager", "fabric manager"), ("engine", "engine"),
    ("toolkit", "toolkit"), ("gpus_by", "GPUs by"), ("image", "image"), ("swap_gib", "swap GiB"), ("models", "models"),
    ("ram_gib", "RAM GiB"),
)  # fmt: skip
"""Fields that should be the same all over a fleet, and their names for a person."""


def read_fleet(
    hosts: Sequence[Host], ssh: Ssh | None = None, folders: Mapping[str, str] | None = None
) -> tuple[HostStatus, ...]:
    """Read all hosts side by side; nothing is changed. A host that cannot be read is told of and stops no other."""
    ssh = ssh or Ssh()
    payload = status_payload()
    argument = json.dumps({**DEFAULT_FOLDERS, **(folders or {})})
    return with_differences(ssh.each(hosts, lambda host: _read_host(ssh, host, payload, argument)))


def _read_host(ssh: Ssh, host: Host, payload: bytes, argument: str) -> HostStatus:
    # As root where sudo asks for no password: kernel messages and other users' files are read then, too.
    script = (
        "p=$(command -v python3) || exit 127; "
        'if sudo -n true 2>/dev/null; then exec sudo -n "$p" - "$1"; fi; exec "$p" - "$1"'
    )
    try:
        answer = ssh.run(host, ["sh", "-c", script, "status", argument], stdin=payload, timeout_seconds=TIMEOUT_SECONDS)
    except HostError as error:
        return HostStatus(host.name, reachable=False, error=str(error))
    if answer.exit_code == 255:
        return HostStatus(host.name, reachable=False, error=connection_error(host, answer.errors).what)
    if answer.exit_code == 127 and not answer.output:
        return HostStatus(host.name, reachable=True, error="a bare host without python3", warnings=("not set up",))
    try:
        return status_from(host.name, json.loads(answer.output))
    except (ValueError, KeyError, TypeError):
        word = last_line(answer.errors) or last_line(answer.output) or f"exit code {answer.exit_code}"
        return HostStatus(host.name, reachable=answer.exit_code != 124, error=f"its state cannot be read: {word}")


def status_from(name: str, found: Mapping[str, Any]) -> HostStatus:
    """A host's state from what `remote_status` printed. Raises KeyError or TypeError for anything else."""
    gpus, engine, fabric = found["gpus"], found["engine"], found["fabric_manager"]
    records = found["records"]
    return HostStatus(
        name=name,
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
        acceptance=_acceptance(_accepted(records).get("report") or {}),
        set_up=str(_accepted(records).get("at") or ""),
        reimaged=_reimaged(_accepted(records).get("stamp") or {}, found["identity"]),
        warnings=_warnings(found),
    )


def _fabric_manager(fabric: Mapping[str, Any]) -> str:
    if not fabric["nvswitch"]:
        return ""
    return f"{fabric['version'] or '?'}{'' if fabric['active'] else ' (not running)'}"


def _image(image: Mapping[str, Any] | None) -> str:
    if not image:
        return ""
    digests = image["digests"]
    return str(digests[0].rsplit("@", 1)[-1] if digests else image["inputs"] or image["id"]).removeprefix("sha256:")[
        :12
    ]


def _accepted(records: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the acceptance role wrote down: report, stamp and time."""
    return records.get("acceptance") or {}


def _reimaged(stamp: Mapping[str, Any], identity: Mapping[str, str]) -> bool | None:
    # A reimaged host has an empty disk and no stamp; one restored from a disk image carries a stamp that does not fit.
    recorded = stamp.get("identity") or {}
    if not recorded:
        return None
    return any(recorded.get(key) not in (None, "", identity.get(key)) for key in ("machine_id", "ssh_host_key"))


def _acceptance(report: Mapping[str, Any]) -> str:
    """The report's figures in a line: every number that it holds at its top, and whether they were good."""
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


def _warnings(found: Mapping[str, Any]) -> tuple[str, ...]:
    driver, engine, gpus = found["driver"], found["engine"], found["gpus"]
    told = []
    if driver["error"]:
        told.append(driver["error"])
    if driver["kernel"] and driver["user"] and driver["kernel"] != driver["user"]:
        told.append(f"driver: kernel module {driver['kernel']}, library {driver['user']}: reboot")
    if engine["error"]:
        told.append(engine["error"])
    fabric = found["fabric_manager"]
    if fabric["nvswitch"] and (not fabric["active"] or (driver["user"] and fabric["version"] != driver["user"])):
        told.append(f"fabric manager {_fabric_manager(fabric)}, driver {driver['user']}: CUDA will fail")
    told += [
        f"{disk['path']}: {disk['free_gib']:g} GiB free"
        for disk in found["disks"][:1]
        if disk["free_gib"] < LEAST_FREE_GIB
    ]
    told += [
        f"GPU {gpu['index']} at {gpu['temperature_celsius']:g} °C"
        for gpu in gpus
        if gpu["temperature_celsius"] >= HOT_CELSIUS
    ]
    told += [f"GPU {gpu['index']}: {gpu['ecc_errors']:g} uncorrectable ECC errors" for gpu in gpus if gpu["ecc_errors"]]
    if found["xid_errors"] is None and gpus:
        told.append("Xid errors cannot be read: that needs root, and sudo asks for a password")
    elif found["xid_errors"]:
        told.append(f"{len(found['xid_errors'])} Xid errors: {found['xid_errors'][-1]}")
    if engine["version"] and not found["image"]:
        told.append("the kit's image is missing")
    return tuple(told)


def with_differences(statuses: Sequence[HostStatus]) -> tuple[HostStatus, ...]:
    """Each host with what it has otherwise than most; nothing where there is no majority to differ from."""
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
    """A value for a table."""
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if value not in ("", None) else "none"


def to_json(statuses: Sequence[HostStatus]) -> str:
    return json.dumps([asdict(status) for status in statuses], indent=2, ensure_ascii=False) + "\n"


def summary_rows(statuses: Sequence[HostStatus]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the table on a terminal."""
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
        told = (status.error,) if status.error else status.warnings + status.differences
        state = "✗" if not status.reachable else "!" if told or status.reimaged else "✓"
        rows.append(
            (
                f"{state} {status.name}",
                f"{status.num_gpus} × {status.gpu_model}" if status.num_gpus else "",
                status.driver,
                status.engine,
                status.image,
                f"{status.disks[0][1]:g}" if status.disks else "",
                ", ".join(status.jobs),
                "; ".join([*(["reimaged since it was set up"] if status.reimaged else []), *filter(None, told)]),
            )
        )
    return columns, rows
