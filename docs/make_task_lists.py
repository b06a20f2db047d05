"""Write docs/tasks.md: the tasks of the playbooks, as `ansible-playbook --list-tasks` prints them.

python docs/make_task_lists.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLAYBOOKS = ("bootstrap", "teardown")
HEAD = """# Tasks of the playbooks

`python docs/make_task_lists.py` writes this page, and a test keeps it current. A tag selects tasks: the name of a role,
or role_install (packages and the image), role_configure (files), role_run (services, checks and measurements) within
every role. `--start-at-task "NAME"` starts at a task.
"""


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for name in PLAYBOOKS:
        command = f"ansible-playbook playbooks/{name}.yml --list-tasks"
        # An empty inventory: the lists depend on no host. Its warning goes to stderr.
        argv = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", f"playbooks/{name}.yml"]
        environment = {
            **os.environ,
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
        }
        done = subprocess.run(
            [*argv, "--list-tasks"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        lines = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
        parts.append(f"## {command}\n\n```\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs/tasks.md").write_text(page(), encoding="utf-8")
