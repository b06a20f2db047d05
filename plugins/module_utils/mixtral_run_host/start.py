"""The start of the kit's modules: an umask that no setting of sudo changes, and words for refusals of the system."""

from __future__ import annotations

import errno
import os

from ansible.module_utils.basic import AnsibleModule

from .files import explain

UMASK = 0o022
_NEXT_STEPS = {
    errno.EROFS: "mount it writable: `findmnt --target PATH` shows its mount; after an error of the disk the kernel mounts "
    "it read-only, see `dmesg`",
    errno.ENOSPC: "free some space there, or choose a path on a larger disk",
    errno.EDQUOT: "raise the quota, or choose a path on another disk",
    errno.EIO: "the disk fails: see `dmesg`",
    errno.ESTALE: "the file server has lost it: mount it again",
}
_NETWORK_NEXT_STEP = (
    "the file server does not let root change it (root_squash): create it on the server with the owner, group and mode "
    "that the role wants, or export it with no_root_squash, or choose a path on a local disk"
)
_DENIED_NEXT_STEP = (
    "`lsattr -d PATH` shows an immutable flag, `findmnt --target PATH` the mount; or choose another path"
)
_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "9p", "lustre", "beegfs", "fuse", "gpfs")


def run_module(act, options):
    """Create the module with these options and call `act` with it.

    Files and programs get the umask 022: sudo may pass on 077, and then apt's own user cannot read the folder of keys,
    and containers cannot read the files of an image. An OSError that `act` raises becomes a message.
    """
    os.umask(UMASK)
    module = AnsibleModule(argument_spec=options, supports_check_mode=True)
    try:
        act(module)
    except OSError as error:
        # A copy that fails here is not the fault of the host that gives the files.
        module.fail_json(msg=refusal(error), blame="me")


def refusal(error):
    """Return the message for an OSError: what the system refused, where, and what to do about it."""
    path = error.filename if isinstance(error.filename, str) else ""
    filesystem = _filesystem(path) if path.startswith("/") else ""
    step = _NEXT_STEPS.get(error.errno, "")
    if error.errno in (errno.EPERM, errno.EACCES):
        step = _NETWORK_NEXT_STEP if filesystem.split(".")[0] in _NETWORK else _DENIED_NEXT_STEP
    return explain(
        "The host refuses a change of a file or folder.",
        where="{} ({})".format(path, filesystem) if filesystem else path,
        found=error.strerror or str(error),
        next_step=step.replace("PATH", path or "PATH"),
    )


def _filesystem(path):
    from .probe import filesystem

    return filesystem(path)
