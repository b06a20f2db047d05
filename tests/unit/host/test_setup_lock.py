"""The lock that a play takes without the command line: what is believed of a note, and which connections have it."""

import fcntl
import importlib.util
import json
import os
import socket
import stat
import subprocess
from types import SimpleNamespace

import pytest

from tests.unit.host.conftest import ROOT

NOTE = {"command": "mixtral-run teardown", "user": "ann", "host": "laptop", "pid": 7, "since": "2026-11-30T10:00:00Z"}


@pytest.fixture
def lock():
    spec = importlib.util.spec_from_file_location("setup_lock", ROOT / "plugins/plugin_utils/setup_lock.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("note", ["", "null", "[]", "x", '{"pid": 1}', "[" * 9000, json.dumps({**NOTE, "user": 3})])
def test_an_odd_note_is_no_holder(lock, note):
    assert lock.holder(note) == "a holder that does not name itself"
    assert not lock._is_dead(note)


def test_a_note_is_one_short_line(lock):
    evil = {**NOTE, "user": "a\x1b[2Jnn\n", "host": "l" * 5000}
    told = lock.holder(json.dumps(evil))
    assert told.isprintable() and len(told) < 400
    assert told.startswith("mixtral-run teardown by a[2Jnn@lll")
    assert lock.holder(json.dumps(NOTE)) == "mixtral-run teardown by ann@laptop, process 7, since 2026-11-30T10:00:00Z"


def test_only_a_run_of_this_machine_is_known_to_be_dead(lock):
    ended = subprocess.Popen(["true"])
    ended.wait()
    mine = {**NOTE, "host": socket.gethostname()}
    assert lock._is_dead(json.dumps({**mine, "pid": ended.pid}))
    assert not lock._is_dead(json.dumps({**mine, "pid": os.getpid()}))
    assert not lock._is_dead(json.dumps({**NOTE, "pid": ended.pid}))


def test_the_lock_goes_over_the_connection_of_the_play(lock):
    built = []

    def build(*words):
        built.append(words)
        return [b"sshpass", b"-d7", *(os.fsencode(word) for word in words)]

    options = {"ssh_executable": "ssh", "host": "10.0.0.1"}
    ssh = SimpleNamespace(transport="ansible.builtin.ssh", get_option=options.get, _build_command=build)
    # The password was needed for the first connection alone.
    assert lock._argv(ssh, ["sh", "-c", "a b"])[:2] == ["ssh", "ssh"]
    assert built == [("ssh", "ssh", "-o", "BatchMode=yes", "10.0.0.1", "sh -c 'a b'")]
    assert lock._argv(SimpleNamespace(transport="local"), ["sh"]) == ["sh"]
    assert lock.take(SimpleNamespace(transport="docker"), None, "x") == (
        "", "Two operators are not kept apart here: connection docker has no lock",
    )  # fmt: skip


def test_it_is_given_back_after_the_task_that_took_it_has_ended(lock, tmp_path, monkeypatch):
    """Each task of a play is a process of its own; nobody reads the keeper's output after it."""
    monkeypatch.setenv("MIXTRAL_RUN_LOCK_FOLDER", str(tmp_path))
    file = tmp_path / "held-here"
    pid = os.fork()
    if pid == 0:
        refused, warning = lock.take(SimpleNamespace(transport="local"), file, "mixtral-run bootstrap")
        os._exit(bool(refused or warning))
    assert os.waitpid(pid, 0)[1] == 0 and file.exists()
    lock.give_back(file)
    assert not file.exists()
    assert (tmp_path / "setup.lock").read_text() == ""


def taken(lock, folder, *words, lines="", path=""):
    """Return the first line of the answer of a holder whose input ends at once."""
    environment = {"PATH": path + os.environ["PATH"]}
    argv = ["sh", "-c", lock.SCRIPT.read_text(), "lock", "me", str(folder), "1", *words]
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, env=environment, check=False)
    return done.stdout.partition("\n")[0].strip()


def test_nobody_but_the_owner_can_open_the_lock(lock, tmp_path):
    """Who can open a file can hold its lock, and a local user would keep every operator away."""
    folder = tmp_path / "run"
    assert taken(lock, folder) == "held"
    file = folder / "setup.lock"
    assert (stat.S_IMODE(folder.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)
    file.chmod(0o666)
    file.write_text("an earlier run")
    assert taken(lock, folder) == "held an earlier run" and stat.S_IMODE(file.stat().st_mode) == 0o600
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert taken(lock, folder) == "busy"


def test_an_older_version_of_the_kit_is_kept_away_and_keeps_away(lock, tmp_path):
    old = tmp_path / "mixtral-run-setup.lock"
    assert taken(lock, tmp_path) == "held" and not old.exists(), "nothing is made where any user can write"
    old.write_text("their note")
    with old.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert taken(lock, tmp_path) == "busy their note"
        assert (tmp_path / "setup.lock").read_text() == ""
    script = ["sh", "-c", lock.SCRIPT.read_text(), "lock", "me", str(tmp_path), "60"]
    with subprocess.Popen(script, stdin=-1, stdout=-1) as holder, old.open() as other:
        assert holder.stdout.readline() == b"held \n"
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        holder.stdin.close()
    assert old.read_text() == "their note"
    # A link could lead root to a file of its own, and a pipe would stop it.
    for make in (lambda: old.symlink_to(tmp_path / "victim"), lambda: os.mkfifo(old)):
        old.unlink()
        make()
        assert taken(lock, tmp_path) == "held" and not (tmp_path / "victim").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_user_who_cannot_change_the_host_keeps_nobody_away(lock, tmp_path):
    old = tmp_path / "mixtral-run-setup.lock"
    old.touch()
    with old.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        stranger = subprocess.Popen(
            ["cat"], stdin=-1, pass_fds=[held.fileno()], user=65534, group=65534, extra_groups=()
        )
    try:
        assert taken(lock, tmp_path) == "held"
    finally:
        stranger.communicate()
    assert stranger.returncode == 0


@pytest.mark.parametrize("kind", ["link of the folder", "open folder", "foreign folder", "link", "folder", "foreign"])
def test_a_lock_that_others_can_replace_is_refused(lock, tmp_path, kind):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    (victim if kind == "link of the folder" else folder).mkdir()
    if kind == "link of the folder":
        folder.symlink_to(victim)
    elif kind == "open folder":
        folder.chmod(0o770)
    elif kind == "link":
        (folder / "setup.lock").symlink_to(victim)
    elif kind == "folder":
        (folder / "setup.lock").mkdir()
    else:
        (folder / "setup.lock").write_text("theirs")
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(folder if kind == "foreign folder" else folder / "setup.lock", 4321, -1)
    assert taken(lock, folder).startswith(f"without {folder}")
    assert not victim.is_file() and not list(victim.glob("*") if victim.is_dir() else ())


SUDO = """#!/bin/sh
# STAND-IN for sudo that knows one password, asks no more after it unless -k is given, and records input as log_input
here=${0%/*} ask= read=
while case $1 in -k) ask=yes ;; -n) ;; -S) read=yes ;; -p) shift ;; *) false ;; esac; do shift; done
if [ -n "$ask" ] || [ ! -e "$here/ticket" ]; then
    [ -n "$read" ] && IFS= read -r word && [ "$word" = "se cret" ] || exit 1
    [ -n "$ask" ] || : >"$here/ticket"
fi
tee -a "$here/log" | "$@"
"""
ID = "#!/bin/sh\n# STAND-IN\n[ $1 = -un ] && echo ops || echo 4321\n"


def test_root_takes_it_for_a_user_whose_sudo_asks_for_a_password(lock, tmp_path):
    for name, text in (("sudo", SUDO), ("id", ID)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    folder, path = tmp_path / "run", f"{tmp_path}:"
    without = f"without {folder}/setup.lock belongs to root, and sudo refuses ops or asks for a password"
    assert taken(lock, folder, path=path) == without
    assert taken(lock, folder, lines="se cret\n", path=path) == without, "a line that nobody announced is no password"
    assert taken(lock, folder, "password", lines="wrong\n", path=path) == without and not folder.exists()
    assert taken(lock, folder, "password", lines="se cret\n..", path=path) == "held" and folder.exists()
    # What sudo does not read as a password is the input of root's command, which the host may record.
    assert (tmp_path / "log").read_text() == ".."
    (tmp_path / "ticket").touch()
    (tmp_path / "log").write_text("")
    assert taken(lock, folder, "password", lines="se cret\n..", path=path) == "held"
    assert "cret" not in (tmp_path / "log").read_text()


def test_the_password_of_the_play_goes_to_the_holder_and_into_no_list_of_processes(lock, tmp_path, monkeypatch):
    script = tmp_path / "script.sh"
    script.write_text(
        'IFS= read -r line; cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ >"$2/shown" 2>/dev/null\n'
        'printf "%s %s" "$4" "$line" >"$2/got"; echo held\n'
    )
    monkeypatch.setattr(lock, "SCRIPT", script)
    monkeypatch.setattr(lock, "FOLDER", str(tmp_path))
    become = SimpleNamespace(name="ansible.builtin.sudo", get_option={"become_pass": "s3cret-of-ann"}.get)
    assert lock.take(SimpleNamespace(transport="local", become=become), tmp_path / "file", "x") == ("", "")
    lock.give_back(tmp_path / "file")
    assert (tmp_path / "got").read_text() == "password s3cret-of-ann"
    shown = (tmp_path / "shown").read_bytes()
    assert b"keeper" in shown and b"s3cret-of-ann" not in shown


@pytest.mark.parametrize("method", ["su", "community.general.run0"])
def test_the_password_of_another_method_does_not_go_to_sudo(lock, tmp_path, monkeypatch, method):
    """With `su` it is root's password, which sudo would take for a wrong one of the login user."""
    script = tmp_path / "script.sh"
    script.write_text('IFS= read -r line; printf "%s %s" "$4" "$line" >"$2/got"; echo without sudo asks ops\n')
    monkeypatch.setattr(lock, "SCRIPT", script)
    monkeypatch.setattr(lock, "FOLDER", str(tmp_path))
    become = SimpleNamespace(name=method, get_option={"become_pass": "root5"}.get)
    assert lock.take(SimpleNamespace(transport="local", become=become), tmp_path / "file", "x") == (
        "",
        f"Two operators are not kept apart here: become method {method.rpartition('.')[2]} has no lock; "
        "without its password: sudo asks ops",
    )
    assert "root5" not in (tmp_path / "got").read_text()
