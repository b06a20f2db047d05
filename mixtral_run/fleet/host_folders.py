"""Folders of a host that jobs use: the checkpoints and the Hugging Face cache, which the role hf_cache creates."""

from __future__ import annotations

from typing import NamedTuple

from mixtral_run.fleet.hosts import Host


class HostFolders(NamedTuple):
    """Absolute folders on a host. The defaults are those of the role."""

    checkpoints: str = "/var/lib/mixtral-run/checkpoints"
    hf_home: str = "/var/lib/mixtral-run/huggingface"


DEFAULT_FOLDERS = HostFolders()


def folders_of(host: Host | None, checkpoints: str | None = None, hf_home: str | None = None) -> HostFolders:
    """Return the folders of a host: the given ones, else those of its inventory or last bootstrap, else the defaults.

    host: None for a machine that no bootstrap has set up, such as the node of a scheduler.
    """
    own = (host.checkpoints_folder, host.hf_home) if host is not None else (None, None)
    return HostFolders(
        checkpoints or own[0] or DEFAULT_FOLDERS.checkpoints, hf_home or own[1] or DEFAULT_FOLDERS.hf_home
    )
