"""apt-get on the host: it waits for locks, uses the kit's proxy, and leaves aside a source that apt cannot read."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import tempfile
import time

from ..commands import run
from ..files import read_text
from . import apt_output

SECONDS = 1800
RETRY_SECONDS = 2
SOURCES = "/etc/apt"
# The words of apt, and those of dpkg since 1.20.1 and before.
LOCKED = re.compile(r"Could not get lock|(?:was|is) locked by another process")


def source_texts(folder=SOURCES):
    """Return the text of every source file that apt reads, by path, in apt's order."""
    parts = glob.glob(os.path.join(folder, "sources.list.d", "*.list"))
    parts += glob.glob(os.path.join(folder, "sources.list.d", "*.sources"))
    return {path: read_text(path, "") for path in [os.path.join(folder, "sources.list")] + sorted(parts)}


class Apt:
    """apt-get with the settings of a module: lock_timeout_seconds, proxy, no_proxy.

    own_source: the kit's source file. warn: takes a sentence about a source of somebody else that apt cannot read.
    """

    def __init__(self, params, own_source="", warn=None):
        self.params, self.own_source, self._warn = params, own_source, warn
        self.aside = set()  # files that apt cannot read; they are left out, not changed
        self._parts = None
        self._lists = []  # options that name other lists of packages than those of the host

    @contextlib.contextmanager
    def own_lists(self):
        """Read lists of packages into a folder of their own within the block, so that a check leaves the host's alone."""
        with tempfile.TemporaryDirectory(prefix="mixtral-run-lists-") as folder:
            for name in ("lists/partial", "archives/partial"):
                os.makedirs(os.path.join(folder, name))
            self._lists = ["-o", "Dir::State::lists={}/lists".format(folder), "-o", "APT::Sandbox::User=root"]
            self._lists += ["-o", "Dir::Cache={}".format(folder)]
            try:
                yield
            finally:
                self._lists = []

    def offered(self, names):
        """Return {name: versions, the newest first} of those packages that the archives of the host offer."""
        try:
            argv = ["apt-cache"] + self._source_options() + self._lists + ["madison"] + names
            rows = [line.split("|") for line in run(argv).out.splitlines()]
        finally:
            self._forget_parts()
        found = {}
        for row in rows:
            if len(row) > 2:
                found.setdefault(row[0].strip(), []).append(row[1].strip())
        return found

    def run(self, words):
        """Run apt-get. If it cannot read a source of somebody else, run it again without this file."""
        try:
            while True:
                answer = self._run_once(words)
                if not answer.code or not self._leave_aside(answer.out + answer.err):
                    return answer
        finally:
            self._forget_parts()

    def _forget_parts(self):
        if self._parts:
            shutil.rmtree(self._parts, ignore_errors=True)
            self._parts = None

    def simulate(self, words):
        """Return what apt-get would do, as apt_output.Simulated, and its answer."""
        answer = self.run(["--simulate"] + words)
        return apt_output.simulated(answer.out), answer

    def when_free(self, attempt):
        """Return the answer of `attempt`, which is repeated while another package manager holds a lock.

        dpkg itself never waits, and apt-get does not for the locks of lists and archives.
        """
        until = time.monotonic() + self.params["lock_timeout_seconds"]
        while True:
            answer = attempt()
            if not answer.code or not LOCKED.search(answer.out + answer.err) or time.monotonic() >= until:
                return answer
            time.sleep(RETRY_SECONDS)

    def automatic(self, names):
        """Return those of the packages that were installed as dependencies."""
        try:
            return set(run(["apt-mark"] + self._source_options() + ["showauto"] + names).out.split())
        finally:
            self._forget_parts()

    def mark(self, verb, names):
        """Hold or unhold packages, or mark them as installed automatically (auto)."""
        try:
            argv = ["apt-mark"] + self._source_options() + [verb] + names
            answer = self.when_free(lambda: run(argv))
        finally:
            self._forget_parts()
        if answer.code and verb != "auto" and apt_output.unreadable(answer.out + answer.err):
            # apt-mark reads the sources too; dpkg does not.
            state = "hold" if verb == "hold" else "install"
            lines = "".join(f"{name} {state}\n" for name in names).encode()
            answer = self.when_free(lambda: run(["dpkg", "--set-selections"], stdin=lines))
        return answer

    def _leave_aside(self, text):
        """Leave out the source files that `text` complains of. Return True if there are further ones."""
        found = apt_output.unreadable(text)
        if found is None:
            return False
        uri, file, message = found
        texts = source_texts()
        files = [file] if file else apt_output.files_naming(uri, texts)
        # One of the entries that contradict each other stays: the kit's own, or else the first, often the system's.
        stays = [self.own_source] if self.own_source in files else [] if file else files[:1]
        fresh = [path for path in files if path not in stays and path not in self.aside]
        self.aside.update(fresh)
        for path in fresh if self._warn else []:
            self._warn(
                "apt cannot read {}, which is not the kit's: {}. It was left out here; other apt commands on this host "
                "fail until it is corrected or removed".format(path, message)
            )
        return bool(fresh)

    def _source_options(self):
        if not self.aside:
            return []
        self._parts = self._parts or tempfile.mkdtemp(prefix="mixtral-run-sources-")
        os.chmod(self._parts, 0o755)
        for path in source_texts():
            link = os.path.join(self._parts, os.path.basename(path))
            if os.path.dirname(path).endswith(".d") and path not in self.aside and not os.path.lexists(link):
                os.symlink(path, link)
            elif path in self.aside and os.path.lexists(link):
                os.unlink(link)
        options = ["-o", "Dir::Etc::sourceparts=" + self._parts, "-o", "APT::Get::List-Cleanup=false"]
        if os.path.join(SOURCES, "sources.list") in self.aside:
            options += ["-o", "Dir::Etc::sourcelist=/dev/null"]
        return options

    def _run_once(self, words):
        """Run apt-get and wait for its locks."""
        params = self.params
        argv = ["apt-get", "--yes", "-o", "DPkg::Lock::Timeout={}".format(params["lock_timeout_seconds"])]
        argv += ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
        argv += self._source_options() + self._lists
        direct, environment = [name.strip().lstrip(".") for name in params["no_proxy"].split(",") if name.strip()], {}
        with tempfile.NamedTemporaryFile("w", prefix="mixtral-run-", suffix=".conf", encoding="utf-8") as settings:
            if params["proxy"] and "*" not in direct:
                # Every user sees the arguments of a program, and a proxy's address may contain a password. The file is
                # readable by root only. Like an argument, it overrides /etc/apt; the environment would not.
                address = re.sub(
                    r'[\x00-\x20\x7f"\\]', lambda found: "%{:02X}".format(ord(found.group())), params["proxy"]
                )
                settings.writelines('Acquire::{}::Proxy "{}";\n'.format(each, address) for each in ("http", "https"))
                settings.flush()
                argv += ["--config-file=" + settings.name]
                # apt also reads this variable. It compares each entry, including blanks, with the end of the host name.
                environment["no_proxy"] = ",".join(direct)
            return self.when_free(lambda: run(argv + words, timeout=SECONDS, environment=environment))
