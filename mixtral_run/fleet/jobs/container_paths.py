"""Paths of a job: where files and folders of the operator's machine and of the host are inside the container."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from mixtral_run.config.data_sources import STANDARD_INPUT, parse_source
from mixtral_run.config.fields import flag_of
from mixtral_run.config.lora import weighted_path
from mixtral_run.config.names.store_names import store_url
from mixtral_run.errors import ConfigError

CHECKPOINTS = "/checkpoints"
HF_HOME = "/huggingface"
JOB_FOLDER = "/job"
"""Folders of the container: the host's checkpoints, its HF cache, and the files of the job."""
JOB_STATE = "/job-state"
"""Folder of the container that a job which is started again writes to; see `mixtral_run/launch/restarts.py`."""
KERNELS = "/kernels"
"""Folder of the container with the kernels that earlier jobs of the same user compiled on the host."""

OF_THE_IMAGE = (
    "/bin", "/dev", "/etc", "/home/mixtral", JOB_FOLDER, JOB_STATE, KERNELS, "/lib", "/lib64", "/opt/mixtral-run",
    "/proc", "/sbin", "/sys", "/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/local/cuda", "/usr/local/lib",
    "/usr/local/nvidia", "/usr/sbin",
)  # fmt: skip
"""Folders of the image that a job needs. A host folder that is or contains one of them is not mounted."""


def path_inside(value: str, flag: str) -> str:
    """Return a path of the host inside the container. A relative one is below CHECKPOINTS."""
    path = PurePosixPath(value)
    if ".." in path.parts:
        raise ConfigError(f"{flag}: a path on a host must not contain '..'.", found=value)
    return str(path if path.is_absolute() else PurePosixPath(CHECKPOINTS) / path)


def mount_for(path: str, is_written: bool, flag: str) -> str | None:
    """Return the host folder to mount for a path: its parent, which exists before the job writes the path.

    An input whose parent would hide a part of the image is mounted by itself. Raises ConfigError if that is impossible
    as well.
    """
    if any(path == each or path.startswith(each + "/") for each in (CHECKPOINTS, HF_HOME)):
        return None
    parent = str(PurePosixPath(path).parent)
    mount = path if parent == "/" or (not is_written and hides_image(parent)) else parent
    if hides_image(mount):
        raise ConfigError(
            f"{flag}: the host's {mount} cannot be mounted: it would hide a folder of the container.",
            expected="a path below the host's checkpoints folder, such as NAME, or elsewhere, such as /data/NAME",
            found=path,
        )
    return mount


def hides_image(folder: str) -> bool:
    """Return True if a folder that is mounted there would hide a folder of the image that a job needs."""
    return any(each == folder or each.startswith(folder.rstrip("/") + "/") for each in OF_THE_IMAGE)


def data_inside(name: str, texts: Sequence[str], files: list[tuple[Path, str]], mounts: dict[str, None]) -> list[str]:
    """Return the sources of data as the container names them. Local files are appended to `files`.

    A dataset on the hub is downloaded by the job.
    """
    found = []
    for number, text in enumerate(texts, start=1):
        source = parse_source(text)
        location = source.location
        if location == STANDARD_INPUT:
            raise ConfigError(
                "Standard input is not sent to a host.", where=f"{flag_of(name)} -", next_command="write it to a file"
            )
        if source.path.is_file():
            # `sha256sum data_path*` in up.py has them in this order.
            location = f"{name}{f'-{number:03d}' if len(texts) > 1 else ''}{source.path.suffix}"
            files.append((source.path, location))
            location = f"{JOB_FOLDER}/{location}"
        elif source.path.is_dir() and not source.path.is_absolute():
            raise ConfigError(
                "A folder of data is not sent to a host.",
                where=f"{flag_of(name)} {text}",
                expected=f"files of this machine, or an absolute path on the host, such as {CHECKPOINTS}/{location}",
                found="a folder of this machine",
                next_command=f"scp -r {location} HOST:…",
            )
        elif not source.on_hub:
            location = path_inside(location, flag_of(name))
            if mount := mount_for(location, False, flag_of(name)):
                mounts[mount] = None
        found.append(location + text.removeprefix(source.location))
    return found


def adapters_inside(texts: Sequence[str], mounts: dict[str, None]) -> list[str]:
    """Return `--adapter PATH[:WEIGHT]` as the container names them."""
    found = []
    for text in texts:
        if store_url(text) is not None:
            found.append(text)
            continue
        given = weighted_path(text)
        path = path_inside(str(given.path), "--adapter")
        if mount := mount_for(path, False, "--adapter"):
            mounts[mount] = None
        found.append(path + given.text_after)
    return found
