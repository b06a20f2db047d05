#!/usr/bin/python
"""Keep the Docker engine enabled, running and on its current settings; never restart it under running containers."""

from __future__ import annotations

DOCUMENTATION = """
module: docker_engine
short_description: Keep the Docker engine running on its current settings without stopping running work
description:
  - Starts and enables the engine, adds users to the docker group, and writes the proxy of the service and containerd's
    root.
  - Performs a reload or restart that is due, including one that an earlier run made due. A restart is deferred while
    containers or GPU processes run, or while the engine does not answer (C(deferred) is true then), unless
    C(restart_when_busy) is true.
  - If the engine does not come up, the files are restored as they were when it last ran, it is started again, and the module
    fails with the lines of the journal.
options:
  users:
    description:
      - Users to keep in the docker group. A member that an earlier run added and that is no longer listed is taken out, and
        a warning names the user. One whose processes run stays until a later run. Other members are left alone.
    type: list
    elements: str
    default: []
  add_users:
    description: Users to add to the docker group for good. They stay when they are no longer named.
    type: list
    elements: str
    default: []
  environment: {description: "Environment variables of the service, such as HTTP_PROXY.", type: dict, default: {}}
  containerd_root: {description: "Root folder of containerd, which holds images from Docker 29 on. Empty means its default.", type: str, default: ""}
  restart_when_busy: {description: Restart even while containers run., type: bool, default: false}
  reload_only: {description: "Perform only the reload or restart that is due, and leave users and files alone. An engine that does not run stays stopped.", type: bool, default: false}
  engine_goes: {description: "With C(absent), the packages of the engine go next: a restart for the settings would be needless, and would start stopped containers.", type: bool, default: false}
  state: {description: C(absent) removes the users and files that the kit added., type: str, choices: [present, absent], default: present}
"""

import os
import re
import shutil
import stat
import time

from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.engine import engine_use, group_members
from ..module_utils.mixtral_run_host.files import Record, explain, read_text, remove, rewrite, write_text
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "users": {"type": "list", "elements": "str", "default": []},
    "add_users": {"type": "list", "elements": "str", "default": []},
    "environment": {"type": "dict", "default": {}},
    "containerd_root": {"type": "str", "default": ""},
    "restart_when_busy": {"type": "bool", "default": False},
    "reload_only": {"type": "bool", "default": False},
    "engine_goes": {"type": "bool", "default": False},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

DOCKER_DROP_IN = "/etc/systemd/system/docker.service.d/mixtral-run.conf"
CONTAINERD_DROP_IN = "/etc/systemd/system/containerd.service.d/mixtral-run.conf"
DAEMON_JSON = "/etc/docker/daemon.json"
REFUSED = ".mixtral-run.refused"
DROP_IN_MODE = 0o600
"""The address of a proxy may contain a password."""
START_SECONDS = 90
NVIDIA_HOOK = "nvidia-container-runtime-hook"


def main():
    run_module(act, OPTIONS)


def act(module):
    engine = Engine(module)
    if module.params["state"] == "absent":
        engine.leave()
    else:
        if not module.params["reload_only"]:
            engine.files()
            engine.users()
        engine.service()
    module.exit_json(
        changed=bool(engine.done), done=engine.done, deferred=bool(engine.deferred), reason=engine.deferred,
        shown=engine.shown, diff=engine.diff,
    )  # fmt: skip


class Engine:
    """State of one run of the module. `done` lists the changes as phrases; `shown` those that everyone has to see."""

    def __init__(self, module):
        self.module, self.params, self.check = module, module.params, module.check_mode
        self.done, self.shown, self.diff, self.deferred = [], [], [], ""
        self.record = Record("docker_engine", check_mode=self.check)
        self.due_record = Record("daemon_json", check_mode=self.check)

    def files(self):
        self._refuse_unit_syntax()
        environment = "".join(
            'Environment="{}={}"\n'.format(*pair) for pair in sorted(self.params["environment"].items())
        )
        root = self.params["containerd_root"]
        start = "ExecStart=\nExecStart=/usr/bin/containerd --root {}\n".format(root) if root else ""
        for path, lines in ((DOCKER_DROP_IN, environment), (CONTAINERD_DROP_IN, start)):
            wanted = "# Written by mixtral-run.\n[Service]\n" + lines if lines else None
            if read_text(path) == wanted:
                if wanted and stat.S_IMODE(os.stat(path).st_mode) != DROP_IN_MODE:
                    self.done.append("mode of {}".format(path))
                    if not self.check:
                        os.chmod(path, DROP_IN_MODE)
                continue
            self.done.append("{} {}".format("wrote" if wanted else "removed", path))
            if not self.check:
                self.record.values.setdefault("rollback", {}).setdefault(path, read_text(path))
                self.record.save()
                self._make_due("restart", os.path.basename(os.path.dirname(path)))
                write_text(path, wanted, mode=DROP_IN_MODE) if wanted else remove(path)
                run(["systemctl", "daemon-reload"])

    def _refuse_unit_syntax(self):
        """Fail if a value would end its line or its quotes in a unit, where it could set any option of a service."""
        values = dict(self.params["environment"], containerd_root=self.params["containerd_root"])
        for name in sorted(values):
            if re.search(r'[\x00-\x1f\x7f"\\]', name + str(values[name])):
                self.module.fail_json(
                    msg=explain(
                        "A setting of the engine's service is not usable.", where=ascii(name),
                        expected="no control characters, quotes or backslashes",
                        next_step="correct docker_proxy, docker_no_proxy or docker_containerd_root",
                    )
                )  # fmt: skip

    def users(self):
        values, now = self.record.values, group_members.members()
        plan = group_members.Members(values, self.params["users"], self.params["add_users"], now or set())
        self._refuse_strangers(plan.add)
        for user, work in plan.busy.items():
            self.module.warn(
                "{} is no longer in docker_users and stays in group docker for now, because processes of {} run: {}. A "
                "later run takes {} out; now: sudo gpasswd --delete {} docker".format(user, user, work, user, user)
            )
        for user in plan.leave:
            self.module.warn(
                "{} {} out of group docker: no longer in docker_users".format(
                    user, "would be taken" if self.check else "was taken"
                )
            )
        self.done += plan.phrases
        self.shown += plan.phrases
        if plan.phrases:
            after = ((now or set()) | set(plan.add)) - set(plan.leave)
            self.diff.append(_members_diff(now or set(), after))
        if now is None and not self.check:
            run(["groupadd", "--system", "docker"])
        # The record comes first: what it holds too much is no member, and is forgotten by the next run.
        values["users"], values["users_once"] = plan.listed + plan.leave, plan.once
        self._save_users()
        commands = [["usermod", "--append", "--groups", "docker", user] for user in plan.add]
        commands += [["gpasswd", "--delete", user, "docker"] for user in plan.leave]
        for command in commands if not self.check else ():
            answer = run(command)
            if answer.code:
                self.module.fail_json(
                    msg=explain("Group docker was not changed.", where=" ".join(command), found=last_lines(answer, 3))
                )
        values["users"] = plan.listed
        self._save_users()

    def _save_users(self):
        for name in ("users", "users_once"):
            if not self.record.values.get(name):
                self.record.values.pop(name, None)
        self.record.save()

    def _refuse_strangers(self, users):
        unknown = [user for user in users if not group_members.exists(user)]
        if unknown:
            self.module.fail_json(
                msg=explain(
                    "Users of docker_users or docker_add_users are not on the host.", where=", ".join(unknown),
                    expected="existing users", next_step="create them, or take them out of the list",
                )
            )  # fmt: skip

    def service(self):
        """Enable and start the engine, or perform what is due."""
        if run(["systemctl", "cat", "docker.service"]).code:
            if self.check or self.params["reload_only"]:
                # A bare host in check mode, or a host whose engine was removed before the toolkit.
                self.done += ["would start the engine"] if self.check else []
                return
            self.module.fail_json(
                msg=explain(
                    "The Docker engine is not installed.",
                    next_step="run the docker role; where it says that its packages wait, end what they wait for first",
                )
            )
        if self.params["reload_only"]:
            self._perform_due()
            return
        if run(["systemctl", "is-enabled", "docker.service"]).out.strip() != "enabled":
            self.done.append("enabled the engine")
            if not self.check:
                run(["systemctl", "enable", "docker.service", "containerd.service"])
        if not _is_active():
            self._look_for_hook()
            self._act("start", "started the engine")
        else:
            self._perform_due()

    def _perform_due(self):
        """Reload or restart the engine if that is due. A stopped engine stays stopped and reads its files when it starts."""
        if not _is_active():
            return
        self._look_for_hook()
        due = self.due_record.values.get("due", "none")
        if due == "reload":
            self._act("reload", "reloaded the engine's settings")
        elif due == "restart":
            self.deferred = "" if self.params["restart_when_busy"] else engine_use.why_busy()
            if not self.deferred:
                self._act("restart", "restarted the engine")
            else:
                keys = ", ".join(self.due_record.values.get("keys", []))
                self.module.warn(
                    "Docker waits to be restarted for {}: {}. It is done by a later run when the host is idle, or now "
                    "with docker_restart_when_busy: true".format(keys, self.deferred)
                )

    def _look_for_hook(self):
        """Make a restart due if NVIDIA's hook was installed after the engine started.

        `docker run --gpus` works only if the hook existed when the engine started (moby, daemon/nvidia_linux.go).
        """
        hook = shutil.which(NVIDIA_HOOK, path="/usr/local/bin:/usr/bin:/bin:/usr/sbin")
        values = self.record.values
        if not hook:
            values.pop("hook_known", None)
        elif not values.get("hook_known"):
            if os.stat(hook).st_ctime < _started_at():
                values["hook_known"] = True
            else:
                self._make_due("restart", NVIDIA_HOOK)
        self.record.save()

    def leave(self):
        for user in group_members.recorded(self.record.values):
            self.done.append("took {} out of group docker".format(user))
            self.shown.append(self.done[-1])
            if not self.check:
                run(["gpasswd", "--delete", user, "docker"])
        installed = not run(["systemctl", "cat", "docker.service"]).code
        for path in (DOCKER_DROP_IN, CONTAINERD_DROP_IN):
            if os.path.exists(path):
                self.done.append("removed {}".format(path))
                if not self.check:
                    if installed and _is_active():
                        self._make_due("restart", os.path.basename(os.path.dirname(path)))
                    remove(path)
                    run(["systemctl", "daemon-reload"])
        self.record.values.pop("hook_known", None)  # looked up again if the engine stays
        self.record.save()
        if installed and self.due_record.values.get("due") and not self.params["engine_goes"]:
            self._perform_due()
            if not _is_active():
                self._forget_due()  # the engine reads its files when it starts
        else:
            self._forget_due()
        if not self.check:
            _forget_refused()

    def _make_due(self, what, key):
        values = self.due_record.values
        values["due"], values["keys"] = what, sorted(set(values.get("keys", [])) | {key})
        self.due_record.save()

    def _act(self, verb, words):
        self.done.append(words)
        if self.check:
            return
        units = ["docker.service"]
        if verb != "reload" and "containerd.service.d" in self.due_record.values.get("keys", []):
            verb, units = "restart", ["containerd.service"] + units  # containerd runs even if the engine does not
        # systemd limits the rate of starts: without the reset it refuses to start an engine that just failed often.
        run(["systemctl", "reset-failed", "docker.service", "containerd.service"])
        answer = run(["systemctl", verb] + units, timeout=START_SECONDS * 2)
        if answer.code or not _answers():
            journal = run(["journalctl", "--unit=docker.service", "--lines=12", "--no-pager", "--output=cat"])
            self._fail_and_roll_back(verb, units, journal)
        self._forget_due()
        _forget_refused()
        self._look_for_hook()

    def _fail_and_roll_back(self, verb, units, journal):
        """Take back the settings that were written since the engine last ran, start it again, and fail the module."""
        refused = self._roll_back()
        end = "nothing of the kit's was changed since it last ran"
        step = "correct what the lines above name, then `sudo systemctl restart docker`"
        if refused:
            run(["systemctl", "reset-failed", "docker.service", "containerd.service"])
            # An engine that refused a reload still runs; a restart could stop its containers.
            again = "reload" if verb == "reload" and _is_active() else "restart"
            runs = not run(["systemctl", again] + units, timeout=START_SECONDS * 2).code and _answers()
            end = "the settings were taken back, and it runs again as before" if runs else (
                "the settings were taken back, and it does not run with those from before either")  # fmt: skip
            step = "correct what the lines above name, then run again; the refused settings are in " + ", ".join(
                refused
            )
        self.module.fail_json(
            msg=explain(
                "The Docker engine does not {}; {}.".format(verb, end),
                where="docker.service",
                expected="`docker info` answers within {} s".format(START_SECONDS),
                found=last_lines(journal, 12),
                next_step=step,
            )
        )

    def _roll_back(self):
        """Restore the files as they were when the engine last ran. Return the files that keep the refused content."""
        refused = []
        settings = self.due_record.values.pop("rollback", None)
        if settings is not None:
            refused.append(_restore(settings["path"], settings["text"]))
            self.due_record.values["sections"] = settings["sections"]
            if not settings["sections"]:
                self.due_record.values.pop("sections")
                self.due_record.values.pop("created", None)
                remove(settings["path"] + ".mixtral-run.bak")
        for path, text in self.record.values.pop("rollback", {}).items():
            refused.append(_restore(path, text, DROP_IN_MODE))
            run(["systemctl", "daemon-reload"])
        self.record.save()
        self._forget_due()
        return [path for path in refused if path]

    def _forget_due(self):
        for name in ("due", "keys", "rollback"):
            self.due_record.values.pop(name, None)
        self.due_record.save()
        if self.record.values.pop("rollback", None) is not None:
            self.record.save()


def _forget_refused():
    for path in (DAEMON_JSON, DOCKER_DROP_IN, CONTAINERD_DROP_IN):
        remove(path + REFUSED)


def _restore(path, text, mode=0o644):
    """Write the former text, or remove the file if there was none. Return where the present one is kept, if it differs."""
    now, kept = read_text(path), ""
    if now is not None and now != text:
        kept = path + REFUSED
        write_text(kept, now, mode=0o600)
    if text is None:
        remove(path)
    else:
        rewrite(path, text, mode)
    return kept


def _started_at():
    """Return the start time of the engine's process in seconds since 1970, or 0 if it does not run."""
    shown = run(
        ["systemctl", "show", "docker.service", "--property=ExecMainStartTimestampMonotonic", "--value"]
    ).out.strip()
    if not shown.isdigit() or shown == "0":
        return 0
    return time.time() - time.clock_gettime(time.CLOCK_MONOTONIC) + int(shown) / 1e6


def _is_active():
    return run(["systemctl", "is-active", "docker.service"]).out.strip() == "active"


def _answers():
    until = time.time() + START_SECONDS
    while time.time() < until:
        if run(["docker", "version", "--format", "{{.Server.Version}}"], timeout=30).code == 0:
            return True
        time.sleep(0.5)
    return False


def _members_diff(before, after):
    header = "members of group docker"
    texts = ["".join(user + "\n" for user in sorted(users)) for users in (before, after)]
    return {"before_header": header, "after_header": header, "before": texts[0], "after": texts[1]}


if __name__ == "__main__":
    main()
