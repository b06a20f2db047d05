"""Start bootstrap on a host and kill Ansible, and dpkg on the host, while the engine's packages are being unpacked."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mixtral_run.fleet.testhosts.hosts import find

LIMIT_SECONDS = 120


def main(inventory: str, name: str) -> int:
    host = find(name)
    argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", inventory, "playbooks/bootstrap.yml"]
    argv += ["--limit", name, "-e", "@tests/molecule/bootstrap/vars/fleet.yml"]
    play = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < until and play.poll() is None:
        if host.shell("pgrep -f 'dpkg .*--unpack' || pgrep -x dpkg-deb", check=False).strip():
            os.killpg(play.pid, signal.SIGKILL)
            host.shell("pkill -KILL apt-get; pkill -KILL dpkg; pkill -KILL -f AnsiballZ || true", check=False)
            print("killed while dpkg unpacked")
            return 0
        time.sleep(0.1)
    print("dpkg was never seen at work", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
