"""One run a folder: the lock that a process holds on what it writes to."""

from mixtral_run.run_lock.lock import (
    LOCK_NAME,
    acquire,
    all_of,
    holder_of,
    lock_file_of,
    lock_problems,
    one_run,
    release,
)
from mixtral_run.run_lock.mounts import reaches_other_hosts
from mixtral_run.run_lock.note import Holder, boot_id
from mixtral_run.run_lock.signs import check_held, is_held, report_loss_with, stop_signs

__all__ = [
    "LOCK_NAME",
    "Holder",
    "acquire",
    "all_of",
    "boot_id",
    "check_held",
    "holder_of",
    "is_held",
    "lock_file_of",
    "lock_problems",
    "one_run",
    "reaches_other_hosts",
    "release",
    "report_loss_with",
    "stop_signs",
]
