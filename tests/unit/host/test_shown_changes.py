"""Changes that a module asks to show are printed by `ansible-playbook`, without control over the terminal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
MODULE = "#!/usr/bin/python\nimport json\nprint(json.dumps({{'changed': True, 'shown': json.loads({!r})}}))\n"


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        (["added a\x1b]0;x\x07\x1b[2Jb\nevil: c\u202e"], "evil: added a ]0;x  [2Jb evil: c \n"),
        (["took é out", 5], "evil: took é out\nevil: 5\n"),
        (5, None),
        ("text", None),
    ],
)
def test_shown_changes_are_plain_lines(tmp_path: Path, shown: object, printed: str | None) -> None:
    (tmp_path / "odd.py").write_text(MODULE.format(json.dumps(shown)))
    (tmp_path / "play.yml").write_text("- hosts: all\n  gather_facts: false\n  tasks: [{odd: }]\n")
    environment = {
        **os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LIBRARY": str(tmp_path), "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }  # fmt: skip
    argv = [Path(sys.executable).parent / "ansible-playbook", "-i", "evil,", "-c", "local", tmp_path / "play.yml"]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "changed: [evil]" in done.stdout, done.stdout + done.stderr
    assert "Callback dispatch" not in done.stdout + done.stderr
    after = done.stdout.partition("changed: [evil]\n")[2].partition("\nPLAY RECAP")[0]
    assert after == (printed or "")
