#!/usr/bin/python
"""Bring an installed NVIDIA driver into the kernel and keep it there: settings, modules, services and the reboot."""

from __future__ import annotations

DOCUMENTATION = """
module: nvidia_driver
short_description: Load an installed NVIDIA driver and keep its parts together
description:
  - Writes the kit's settings for nouveau, unattended upgrades and the persistence daemon, builds missing modules for the
    running and the next kernel, loads the modules, and starts the services of the driver.
  - Replaces loaded modules of another version if no program uses them. Otherwise a reboot is due, and C(reboot) says whether
    the role may reboot the host now. It never may while containers or GPU processes run.
  - C(absent) takes the settings back and unloads the modules.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  target: {description: Version of the driver that was installed., type: str, default: ""}
  board: {description: Kind of the board., type: str, choices: ["", pcie, nvswitch, nvlink5], default: ""}
  persistence: {description: Run the persistence daemon., type: bool, default: true}
  unattended: {description: Regular expressions for packages that unattended upgrades leave alone., type: list, elements: str, default: []}
  reload: {description: Replace loaded modules without a reboot if nothing uses them., type: bool, default: true}
  reboot: {description: What to do about a reboot that is due., type: str, choices: [never, when_idle, ask], default: ask}
  rebooted: {description: True after the reboot., type: bool, default: false}
  change_when_busy: {description: Take the settings back even while something runs. Its services and modules stay., type: bool, default: false}
  state: {description: C(absent) takes back what was changed., type: str, choices: [present, absent], default: present}
"""

import contextlib
import os

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.commands import MISSING, last_lines, run
from ..module_utils.mixtral_run_host.engine import engine_use
from ..module_utils.mixtral_run_host.files import Record, explain, read_text, remove, write_text
from ..module_utils.mixtral_run_host.gpu import (
    driver_files,
    driver_guard,
    driver_load,
    driver_parts,
    driver_plan,
    driver_states,
    gpu_driver,
)
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "required": True},
    "target": {"type": "str", "default": ""},
    "board": {"type": "str", "choices": ["", "pcie", "nvswitch", "nvlink5"], "default": ""},
    "persistence": {"type": "bool", "default": True},
    "unattended": {"type": "list", "elements": "str", "default": []},
    "reload": {"type": "bool", "default": True},
    "reboot": {"type": "str", "choices": ["never", "when_idle", "ask"], "default": "ask"},
    "rebooted": {"type": "bool", "default": False},
    "change_when_busy": {"type": "bool", "default": False},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

NOUVEAU = "/etc/modprobe.d/mixtral-run-nouveau.conf"
UNATTENDED = "/etc/apt/apt.conf.d/52mixtral-run-nvidia-driver"
PERSISTENCE = "/etc/systemd/system/nvidia-persistenced.service.d/mixtral-run.conf"
NVLINK5 = "/etc/modules-load.d/mixtral-run-nvlink5.conf"
SWITCHES = ("nvswitch", "nvlink5")
PERSISTENCED, FABRIC_MANAGER = "nvidia-persistenced", "nvidia-fabricmanager"


def main():
    run_module(act, OPTIONS)


def act(module):
    driver = Driver(module)
    if module.params["state"] == "absent":
        driver.leave()
    else:
        driver.settings()
        driver.build()
        driver.kernel()
        driver.services()
        driver.verify()
    module.exit_json(changed=bool(driver.done), done=driver.done, diff=driver.diffs, due=driver.due, reboot=driver.now)


class Driver:
    """State of one run of the module. `done` lists the changes as phrases, `due` says why a reboot is due."""

    def __init__(self, module):
        self.module, self.params, self.check = module, module.params, module.check_mode
        self.done, self.diffs, self.due, self.now = [], [], "", False
        self.record = Record("nvidia_driver", check_mode=self.check)

    def settings(self):
        """Write the kit's files, each with the content that the host had before in the record."""
        self._refuse_quotes()
        for path, text in zip((NOUVEAU, UNATTENDED, PERSISTENCE, NVLINK5), driver_files.texts(self.params)):
            self._put(path, text)
        self._initramfs()
        self._tell_systemd()

    def _refuse_quotes(self):
        wrong = [each for each in self.params["unattended"] if '"' in each or "\n" in each]
        if wrong:
            self._fail("A pattern for unattended upgrades is not usable.", repr(wrong[0]), "no quotes or line ends",
                       "correct nvidia_driver_unattended_blacklist")  # fmt: skip

    def _put(self, path, text):
        before = read_text(path)
        mine = self.record.values.get("files", {})
        if before == text or (text is None and path not in mine):
            return
        self.done.append("{} {}".format("wrote" if text is not None else "removed", path))
        self.diffs.append({"before": before or "", "after": text or "", "before_header": path, "after_header": path})
        if self.check:
            return
        self.record.values.setdefault("files", {}).setdefault(path, before)
        due = {NOUVEAU: "initramfs_due", PERSISTENCE: "reload_due"}.get(path)
        if due:
            self.record.values[due] = True
        self.record.save()
        if text is None:
            self._take_back(path)
        else:
            write_text(path, text)

    def _take_back(self, path):
        before = self.record.values["files"].pop(path)
        if before is None:
            remove(path)
            with contextlib.suppress(OSError):  # systemd's folder of settings, which may hold others
                os.rmdir(os.path.dirname(path))
        else:
            write_text(path, before)
        self.record.save()

    def _initramfs(self):
        """Renew the initramfs after a change of what it must not load, also if an earlier run was killed before."""
        if not self.record.values.get("initramfs_due"):
            return
        self.done.append("renewed the initramfs")
        if self.check:
            return
        answer = run(["update-initramfs", "-u", "-k", "all"], timeout=driver_load.INITRAMFS_SECONDS)
        if answer.code not in (0, MISSING):
            self._fail("The initramfs cannot be renewed: nouveau could hold the GPUs after a reboot.",
                       last_lines(answer, 3), "`update-initramfs -u -k all` ends with 0", "see /boot: is it full?")  # fmt: skip
        del self.record.values["initramfs_due"]
        self.record.save()

    def _tell_systemd(self):
        """Let systemd read the settings of the persistence daemon, also if an earlier run was killed or had to wait."""
        if self.check or not self.record.values.get("reload_due"):
            return
        why = driver_guard.why_reload_waits()
        if why:
            self._warn("{} takes effect with a later run: {}".format(PERSISTENCE, why))
            return
        run(["systemctl", "daemon-reload"])
        if self.params["persistence"] and self._is_active(PERSISTENCED):
            run(["systemctl", "restart", PERSISTENCED])
        del self.record.values["reload_due"]
        self.record.save()

    def parts(self):
        """Read the parts of the driver anew."""
        return driver_parts.parts(self.params["board"] in SWITCHES, self.params["target"])

    def build(self):
        """Build missing modules for the running kernel and for the one that boots next."""
        parts = self.parts()
        for release in sorted({parts.running_kernel, parts.newest_kernel or parts.running_kernel}):
            version = driver_parts.module_field(release, "version")
            if version is None or (version and version == parts.library) or (version and not parts.library):
                continue
            if release != parts.newest_kernel and parts.in_newest_kernel and parts.in_newest_kernel == parts.library:
                # Ubuntu's modules are for its newest kernel: the running one, which is older, needs none.
                self.due = "the modules are for kernel {}, which boots next".format(parts.newest_kernel)
                continue
            if self.check:
                self.done.append("would build the modules for kernel {}".format(release))
                continue
            why = driver_load.build(release, parts.library)
            if why:
                self._fail("The driver's kernel modules cannot be built.", why, "modules for kernel {}".format(release),
                           "install the kernel's headers (`linux-headers-{}`), or a driver that supports this kernel; the "
                           "log is /var/lib/dkms/nvidia/VERSION/build/make.log".format(release))  # fmt: skip
            self.done.append("built the modules for kernel {}".format(release))

    def kernel(self):
        """Load the modules, or replace loaded ones. If that is not possible now, a reboot is due."""
        parts = self.parts()
        demand = self.record.values.get("due")
        if demand and demand["boot"] != driver_guard.boot_id():
            del self.record.values["due"]
            self.record.save()
        elif demand and not self.due:
            self.due = demand["why"]
        if self.due:
            return
        if not parts.loaded:
            self._load()
        elif parts.on_disk and parts.loaded != parts.on_disk:
            self._replace(parts)

    def _load(self):
        self.done.append("loaded the kernel modules")
        if self.check:
            return
        why = driver_load.load("the module on disk")
        if why.startswith("nouveau"):
            self.due = why
        elif why:
            self._fail("The NVIDIA driver cannot be loaded.", why, "`modprobe nvidia` ends with 0",
                       driver_load.next_step(why))  # fmt: skip

    def _replace(self, parts):
        words = "module {} is loaded, {} is on disk".format(parts.loaded, parts.on_disk)
        busy = self.busy()
        if busy or not self.params["reload"]:
            self.due = words
            return
        if self.check:
            self.done.append("would replace module {} by {}".format(parts.loaded, parts.on_disk))
            return
        driver_guard.cordon()
        try:
            # A job may have started before the host was cordoned.
            why = driver_guard.wait_for_starts() or self.busy() or driver_load.reload(self.params["board"], self._warn)
        finally:
            driver_guard.uncordon()
        if why:
            self.due = "{}; {}".format(words, why)
            if self.parts().loaded == parts.on_disk:  # the parts agree, so that the next run would not see it
                self.record.values["due"] = {"boot": driver_guard.boot_id(), "why": why}
                self.record.save()
        else:
            self.done.append("replaced module {} by {}".format(parts.loaded, parts.on_disk))

    @staticmethod
    def busy():
        """Return what uses the GPUs or runs in containers, or an empty text."""
        return engine_use.why_busy() or driver_parts.why_held()

    def services(self):
        """Enable and start the persistence daemon, and the fabric manager of a board with switches."""
        if self.params["board"] == "nvlink5" and not self.due:
            loaded, why = driver_load.load_for_nvlink5(self.check)
            self.done += ["loaded the kernel module {}".format(each) for each in loaded]
            if why:
                self._fail("The fabric manager of this board cannot start without its kernel modules.", why,
                           "`modprobe -a mlx5_ib ib_umad` ends with 0", "install linux-modules-extra-{} on Ubuntu; if there "
                           "is none, reboot into the newest kernel".format(os.uname().release))  # fmt: skip
        wanted = [PERSISTENCED] if self.params["persistence"] else []
        wanted += [FABRIC_MANAGER] if self.params["board"] in SWITCHES else []
        for unit in wanted:
            if run(["systemctl", "cat", unit]).code:
                if unit == FABRIC_MANAGER and not self.check:
                    self._fail("The fabric manager has no unit.", "none", "nvidia-fabricmanager.service",
                               "look at the packages: `dpkg -L nvidia-fabricmanager`")  # fmt: skip
                continue
            if run(["systemctl", "is-enabled", unit]).out.strip() not in ("enabled", "static"):
                self.record.values["enabled"] = sorted(set(self.record.values.get("enabled", [])) | {unit})
                self.record.save()
                self._do("enabled {}".format(unit), ["systemctl", "enable"] + driver_guard.no_reload() + [unit])
            if not self.due and not self._is_active(unit):
                run(["systemctl", "reset-failed", unit])
                self._do("started {}".format(unit), ["systemctl", "start", unit])

    def _do(self, words, argv):
        """Run a command of systemctl. A failure is a warning, but that of a start of the fabric manager is an error."""
        answer = None if self.check else run(argv, timeout=180)
        if answer is None or not answer.code:
            self.done.append(words)
        elif argv[1:] == ["start", FABRIC_MANAGER]:
            journal = run(["journalctl", "--unit=" + argv[-1], "--lines=6", "--no-pager", "--output=cat"])
            self._fail("The fabric manager does not start: CUDA would fail with error 802.", last_lines(journal, 6),
                       "`systemctl start {}` ends with 0".format(argv[-1]), "see /var/log/fabricmanager.log")  # fmt: skip
        else:
            words = "{}: `{}` fails: {}"
            self.module.warn(words.format(self.params["host"], " ".join(argv), last_lines(answer, 1)))

    @staticmethod
    def _is_active(unit):
        return run(["systemctl", "is-active", unit]).out.strip() == "active"

    def verify(self):
        """Fail unless the GPUs work now, or a reboot will make them work and is allowed or asked for."""
        if self.check:
            return
        found = driver_states.findings(self.parts())
        if self.due:
            self._reboot(found)
            return
        gpus = probe.gpus()
        if gpus["error"] or not driver_states.works(found):
            words = [gpus["error"]] if gpus["error"] else ["{}: {}".format(each.expected, each.found) for each in found]
            steps = [each.step for each in found] or ["look at `sudo dmesg | grep -i nvrm` on the host"]
            self._fail("The NVIDIA driver is installed and does not work.", "; ".join(words),
                       "`nvidia-smi` ends with 0", "; ".join(steps))  # fmt: skip
        why = driver_load.why_no_fabric() if self.params["board"] in SWITCHES else ""
        if why:
            self._fail("The fabric of the GPUs is not ready: CUDA would fail with error 802.", why,
                       "fabric.state Completed, fabric.status Success", "see /var/log/fabricmanager.log")  # fmt: skip
        driver_guard.uncordon()

    def _reboot(self, found):
        may = driver_states.may_reboot(found)
        step = "mixtral-run bootstrap {} --tags nvidia_driver".format(self.params["host"])
        if self.params["rebooted"]:
            self._fail("The reboot did not bring the driver that is on disk.", self.due, "the module on disk is loaded",
                       "look at `modinfo nvidia` and `lsinitramfs /boot/initrd.img | grep nvidia`")  # fmt: skip
        busy = self.busy()
        decision = driver_plan.reboot_decision(self.params["reboot"], self.due, may, busy)
        if decision == "now":
            driver_guard.cordon()
            busy = driver_guard.wait_for_starts() or self.busy()  # a job may have started before the host was cordoned
            if busy:
                driver_guard.uncordon()
            decision = "deferred" if busy else decision
        if decision == "blocked":
            self._fail("A reboot is due, and would leave the host without GPUs.",
                       "; ".join(each.found for each in found if each.when == driver_states.NEXT_BOOT),
                       "a driver that works after the reboot", "; ".join(each.step for each in found))  # fmt: skip
        if decision == "ask":
            self._fail("A reboot is due before the new driver works; it was not done.", self.due,
                       "nvidia_driver_reboot: when_idle, or a reboot by hand",
                       step + " -e nvidia_driver_reboot=when_idle reboots the host when it is idle")  # fmt: skip
        if decision in ("deferred", "never"):
            why = busy if decision == "deferred" else "nvidia_driver_reboot is never"
            step += " -e nvidia_driver_reboot=when_idle" * (decision == "never")
            words = "the driver waits for a reboot ({}): {}. A later run of `{}` does it when the host is idle{}"
            self._warn(words.format(self.due, why, step, self._cordon_stays()))
        self.now = decision == "now"

    def leave(self):
        """Take back the settings, and unload the modules if the kit installed them and nothing uses them.

        A host on which something runs is left alone before anything is changed: the services hold the fabric of its jobs.
        """
        mine = bool(Record("packages").values.get("nvidia_driver") and gpu_driver.kernel_driver())
        if not (mine or self.record.values):
            return
        if not self.check:
            driver_guard.cordon()
        try:
            busy = ("" if self.check else driver_guard.wait_for_starts()) or self.busy()
            may = not busy or self.params["change_when_busy"]
            if may:
                self._leave(busy, mine)
        finally:
            if not self.check:
                driver_guard.uncordon()
        if not may:
            self._fail("The driver is in use; nothing was changed.", busy, "no container, and no program on the GPUs",
                       "end it and run again, or set nvidia_driver_restart_when_busy: true, which takes back files and "
                       "packages, and leaves the modules until the next boot")  # fmt: skip

    def _leave(self, busy, mine):
        """Take everything back. What runs on a busy host keeps its services and modules. mine: the modules are the kit's."""
        for path, before in sorted(self.record.values.get("files", {}).items()):
            self.done.append("took back {}".format(path))
            header = {"before_header": path, "after_header": path}
            self.diffs.append(dict(before=read_text(path, ""), after=before or "", **header))
            if not self.check:
                if path == NOUVEAU:
                    self.record.values["initramfs_due"] = True
                self._take_back(path)
                if path == PERSISTENCE and not driver_guard.why_reload_waits():
                    run(["systemctl", "daemon-reload"])
        for key in ("files", "due", "reload_due"):
            self.record.values.pop(key, None)
        self._initramfs()
        for unit in self.record.values.pop("enabled", []):
            self._do(
                "disabled {}".format(unit),
                ["systemctl", "disable"] + (driver_guard.no_reload() if busy else ["--now"]) + [unit],
            )
        self.record.save()
        if mine:
            why = busy or ("" if self.check else driver_load.unload())
            if not why:
                self.done.append("unloaded the kernel modules")
                return
            self._warn("the NVIDIA modules stay loaded until the next reboot: {}".format(why))

    def _warn(self, words):
        self.module.warn("{}: {}".format(self.params["host"], words))

    def _fail(self, what, found, expected, step):
        parts = {"where": self.params["host"], "found": found, "expected": expected}
        self.module.fail_json(msg=explain(what, next_step=step + self._cordon_stays(), **parts))

    def _cordon_stays(self):
        """Return what to do about a cordon of the role that an earlier run set and this one leaves."""
        words = "; the host stays cordoned until a run finds the driver in order, or `mixtral-run uncordon {}`"
        return words.format(self.params["host"]) if driver_guard.is_cordoned() else ""


if __name__ == "__main__":
    main()
