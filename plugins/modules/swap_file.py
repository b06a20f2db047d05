#!/usr/bin/python
"""Create a swap file of the given size in the way that the filesystem needs, and enable it now and at boot."""

from __future__ import annotations

DOCUMENTATION = """
module: swap_file
short_description: Create a swap file of the given size, enabled now and at boot
description:
  - Resizes by writing a second file first, so that swap is off only for a moment and nothing is lost on a full disk.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  path: {description: Path of the swap file., type: path, required: true}
  size_gib: {description: "Size in GiB. -1 means the difference between C(target_gib) and RAM; 0 means no swap file.", type: float, default: -1}
  target_gib: {description: "RAM and swap together, in GiB.", type: float, default: 128}
  swappiness: {description: "Value of vm.swappiness; -1 leaves it alone.", type: int, default: -1}
  state: {description: C(absent) removes the kit's swap file and setting., type: str, choices: [present, absent], default: present}
"""

import math
import os

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.files import Record, explain, read_text, remove, rewrite, write_text
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "required": True},
    "path": {"type": "path", "required": True},
    "size_gib": {"type": "float", "default": -1},
    "target_gib": {"type": "float", "default": 128},
    "swappiness": {"type": "int", "default": -1},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

FSTAB = "/etc/fstab"
SYSCTL = "/etc/sysctl.d/60-mixtral-run.conf"
SWAPPINESS = "/proc/sys/vm/swappiness"
REFUSED = ("overlay", "tmpfs", "ramfs", "zfs", "nfs", "nfs4", "aufs", "fuse.overlayfs", "squashfs")
# On these, swap accepts the unwritten extents that fallocate leaves. Elsewhere zeros are written (XFS before Linux 4.18 too).
FALLOCATE = ("ext4", "xfs")
KEEP_FREE_GIB = 5
MIB = 2**20


def main():
    run_module(act, OPTIONS)


def act(module):
    swap = Swap(module)
    present = module.params["state"] == "present"
    swap.size(_wanted_mib(module.params) if present else 0)
    swap.swappiness(module.params["swappiness"] if present else -1)
    module.exit_json(changed=bool(swap.done), done=swap.done, size_gib=swap.now_mib / 1024)


def _wanted_mib(params):
    if params["size_gib"] >= 0:
        return int(params["size_gib"] * 1024)
    ram = probe.memory()["ram_gib"]
    # Memory modules of 128 GB show as about 125 GiB, which is enough.
    return 0 if ram >= params["target_gib"] * 0.95 else math.ceil(params["target_gib"] - ram) * 1024


class Swap:
    """State of one run of the module. `done` lists the changes as phrases."""

    def __init__(self, module):
        self.module, self.check, self.path = module, module.check_mode, module.params["path"]
        self.done, self.now_mib = [], 0
        self.record = Record("swap", check_mode=self.check)

    def size(self, wanted):
        self._finish_switch()
        mine = self.record.values.get("path")
        if mine and (mine != self.path or not wanted):
            self._take_down(mine)
        there = os.path.exists(self.path)
        if not wanted:
            return
        if there and self.record.values.get("path") != self.path:
            self._refuse("the file is not the kit's", "a path where nothing lies, or the kit's own swap file",
                         "choose another swap_path")  # fmt: skip
        self.now_mib = os.path.getsize(self.path) // MIB if there else 0
        if self.now_mib != wanted or not self._is_swap():
            self._make(wanted, there)
        elif os.stat(self.path).st_mode & 0o777 != 0o600:
            self._do("mode 0600 on {}".format(self.path), lambda: os.chmod(self.path, 0o600))
        if not self._is_on(self.path):
            self._do("switched {} on".format(self.path), lambda: self._on(self.path))
        self._fstab(wanted=True)

    def swappiness(self, wanted):
        before = self.record.values.get("swappiness_before")
        text = read_text(SYSCTL)
        if wanted < 0:
            if text is not None:
                self._do("vm.swappiness taken back", lambda: remove(SYSCTL))
                if before is not None and not self.check:
                    self._set_swappiness(before)
                    del self.record.values["swappiness_before"]
            self.record.save()
            return
        wanted_text = "# Written by mixtral-run.\nvm.swappiness = {}\n".format(wanted)
        now = int(read_text(SWAPPINESS, "60"))
        if before is None and now != wanted:
            self.record.values["swappiness_before"] = now
            self.record.save()
        if text != wanted_text:
            self._do("vm.swappiness = {} at boot".format(wanted), lambda: write_text(SYSCTL, wanted_text))
        if now != wanted:
            self._do("vm.swappiness = {}".format(wanted), lambda: self._set_swappiness(wanted))

    def _set_swappiness(self, value):
        try:
            with open(SWAPPINESS, "w") as file:
                file.write(str(value))
        except OSError as error:
            self._refuse(str(error), "vm.swappiness can be set", "on a host in a container set swap_swappiness: -1")

    def _make(self, wanted, there):
        filesystem = probe.filesystem(os.path.dirname(self.path))
        if filesystem in REFUSED:
            self._refuse("{} is on {}, which takes no swap file".format(os.path.dirname(self.path), filesystem),
                         "ext4, xfs or btrfs", "put swap_path on a disk with one of these, or set swap_size_gib: 0")  # fmt: skip
        free = probe.disk(self.path)["free_gib"]
        needed = wanted / 1024 + KEEP_FREE_GIB
        if free < needed:
            self._refuse("{:g} GiB free on {}".format(free, os.path.dirname(self.path)),
                         "{:g} GiB free: the file and {} GiB to spare".format(needed, KEEP_FREE_GIB),
                         "set swap_size_gib, or put swap_path on a larger disk")  # fmt: skip
        if there:
            self.done.append("resized {} from {} to {} MiB".format(self.path, self.now_mib, wanted))
        else:
            self.done.append("made {} of {} MiB".format(self.path, wanted))
        if self.check:
            return
        self.record.values["path"] = self.path
        self.record.save()
        fresh = self.path + ".new" if there else self.path
        self._write(fresh, wanted, filesystem)
        if there:
            # The kernel cannot rename a file that is in use as swap, so for a moment no swap is enabled.
            if self._is_on(self.path):
                self._off(self.path, cleanup=fresh)
            os.rename(fresh, self.path)
        self._on(self.path)
        self.now_mib = wanted

    def _finish_switch(self):
        """Remove PATH.new, which a run that was killed during a resize leaves behind."""
        fresh = self.path + ".new"
        if os.path.exists(fresh) and not self.check:
            run(["swapoff", fresh], timeout=600)
            remove(fresh)

    def _write(self, path, mib, filesystem):
        remove(path)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        if filesystem == "btrfs":
            run(["chattr", "+C", path])  # the kernel refuses a copy-on-write file as swap
        answer = (
            run(["fallocate", "--length", "{}M".format(mib), path], timeout=600) if filesystem in FALLOCATE else None
        )
        if answer is None or answer.code:
            answer = run(["dd", "if=/dev/zero", "of=" + path, "bs=1M", "count={}".format(mib)], timeout=7200)
        if not answer.code:
            answer = run(["mkswap", path])
        if answer.code:
            remove(path)
            self._refuse(last_lines(answer, 3), "a swap file of {} MiB".format(mib), "look at the disk")

    def _on(self, path):
        answer = run(["swapon", path])
        if answer.code:
            remove(path)
            if path == self.path and not self.check:
                self.record.values.pop("path", None)  # nothing is left to remove
                self.record.save()
            self._refuse(last_lines(answer, 2), "a swap file that the kernel takes",
                         "holes, copy-on-write or an overlay are not taken: put swap_path on ext4 or xfs")  # fmt: skip

    def _off(self, path, cleanup=None):
        answer = run(["swapoff", path], timeout=3600)
        if answer.code:
            if cleanup:
                remove(cleanup)
            self._refuse(last_lines(answer, 2), "what is swapped out fits into RAM", "end a job first: swap is in use")

    def _take_down(self, path):
        self._do("removed {}".format(path), lambda: None)
        self._fstab(wanted=False, path=path)
        if self.check:
            return
        if self._is_on(path):
            self._off(path)
        remove(path)
        del self.record.values["path"]
        self.record.save()

    def _fstab(self, wanted, path=None):
        path = path or self.path
        text = read_text(FSTAB, "")
        lines = [line for line in text.splitlines() if line.split()[:1] != [path]]
        if wanted:
            lines.append("{} none swap sw 0 0".format(path))
        after = "".join(line + "\n" for line in lines)
        if after != text and sorted(after.split()) != sorted(text.split()):
            self._do("fstab: {}{}".format("" if wanted else "no ", path), lambda: rewrite(FSTAB, after))

    def _is_swap(self):
        with open(self.path, "rb") as file:
            file.seek(os.sysconf("SC_PAGE_SIZE") - 10)
            return file.read(10) == b"SWAPSPACE2"

    def _is_on(self, path):
        return path in [each["path"] for each in probe.swap_files()]

    def _do(self, words, action):
        self.done.append(words)
        if not self.check:
            action()

    def _refuse(self, found, expected, next_step):
        where = "{}: {}".format(self.module.params["host"], self.path)
        self.module.fail_json(
            msg=explain(
                "The swap file cannot be made.", where=where, expected=expected, found=found, next_step=next_step
            )
        )


if __name__ == "__main__":
    main()
