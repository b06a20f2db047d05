"""A host opens its HF cache to the key of another host for one model, to list and read, and for nothing else."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.model import hf_peer
from ansible.module_utils.mixtral_run_host.model.hf_peer import Peer
from ansible.module_utils.mixtral_run_host.model.model_cache import ModelCache, ModelError, RemoteFile

from tests.unit.host.conftest import ROOT

SERVER = ROOT / "roles/hf_cache/files/serve_model.py"
WEIGHTS = bytes(range(256)) * 5000
COMMIT = "c" * 40


@pytest.fixture
def cache(tmp_path: Path) -> ModelCache:
    cache = ModelCache(str(tmp_path / "home"), "org/model")
    files = []
    for name, data in (("config.json", b"{}"), ("model.safetensors", WEIGHTS), ("old.bin", b"no")):
        digest = hashlib.sha256(data).hexdigest()
        blob = Path(cache.blob(digest))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(data)
        files.append(RemoteFile(name, len(data), digest))
    cache.publish("main", COMMIT, files)
    (tmp_path / "home/token").write_text("hf_secret")
    return cache


def serve(cache: ModelCache, command: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "SSH_ORIGINAL_COMMAND": command}
    return subprocess.run(
        [sys.executable, str(SERVER), cache.folder], env=environment, capture_output=True, check=False
    )


def test_it_lists_and_gives_from_a_byte_on(cache: ModelCache) -> None:
    beside = Path(cache.folder) / "snapshots" / COMMIT / "quantised-fp8"
    beside.mkdir()
    (beside / "layer_00.safetensors").write_bytes(b"experts that finetune keeps")
    listing = json.loads(serve(cache, "list main").stdout)
    assert listing["commit"] == COMMIT
    assert [name for name, _, _ in listing["files"]] == ["config.json", "model.safetensors", "old.bin"]
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert serve(cache, f"get {digest} 0").stdout == WEIGHTS
    assert serve(cache, f"get {digest} 1000000").stdout == WEIGHTS[1000000:]


@pytest.mark.parametrize(
    "command",
    [
        "",
        "sh",
        "get ../../../token 0",
        "list ../../..",
        "list a/../b",
        "list /etc/alternatives",
        "list .",
        "list ./main",
        "get " + "a" * 64 + " " + "9" * 30,
        "get " + "a" * 64 + " 0; id",
        "list main\nlist main",
    ],
)
def test_anything_else_is_refused(cache: ModelCache, command: str) -> None:
    done = serve(cache, command)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"only list REVISION and get HASH START are served" in done.stderr


def test_what_is_not_there_is_reported(cache: ModelCache) -> None:
    assert b"has no revision other" in serve(cache, "list other").stderr
    assert b"No such file" in serve(cache, "get " + "a" * 40 + " 0").stderr


@pytest.mark.parametrize("revision", ["sub", "snapshots", "other"])
def test_only_a_commit_is_listed(cache: ModelCache, tmp_path: Path, revision: str) -> None:
    """A reference holds a path, and a folder beside the commits holds links."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/link").symlink_to(tmp_path / "home/token")
    (Path(cache.folder) / "refs/other").write_text(str(tmp_path / "outside"))
    (Path(cache.folder) / "snapshots/sub").symlink_to(tmp_path / "outside")
    done = serve(cache, f"list {revision}")
    assert (done.returncode, done.stdout) == (1, b"") and f"has no revision {revision}".encode() in done.stderr


@pytest.fixture
def peer(cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """STAND-IN for ssh: the program that the key is bound to runs here. The real one is in the role's scenario."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(
        f'#!/bin/sh\nfor last; do :; done\nSSH_ORIGINAL_COMMAND="$last" exec {sys.executable} {SERVER} {cache.folder}\n'
    )
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Peer("gpu-01", 22, "ops", "org/model", "/key", "/known_hosts")


def fetch(peer: Peer, home: Path) -> ModelCache:
    mine = ModelCache(str(home), "org/model")
    commit = peer.commit("main")
    files = peer.files(commit, ["*.json", "*.safetensors"])
    for file in files:
        if not mine.has(file):
            mine.fetch(peer, commit, file)
    mine.publish("main", commit, files)
    return mine


def test_a_model_is_taken_over_and_resumed(peer: Peer, tmp_path: Path) -> None:
    home = tmp_path / "mine"
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    partial = Path(ModelCache(str(home), "org/model").blob(digest) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:123457])
    mine = fetch(peer, home)
    snapshot = Path(mine.folder) / "snapshots" / COMMIT
    assert {each.name for each in snapshot.iterdir()} == {"config.json", "model.safetensors"}
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


def _replace_ssh(tmp_path: Path, *lines: str) -> None:
    (tmp_path / "bin/ssh").write_text("\n".join(["#!/bin/sh", *lines]) + "\n")


def test_a_host_that_prints_many_errors_does_not_block_the_copy(peer: Peer, tmp_path: Path) -> None:
    _replace_ssh(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' e >&2", "printf whole", "exit 3")
    found = []

    def read() -> None:
        try:
            with peer.open_file(COMMIT, RemoteFile("x", 5, "a" * 64), 0) as (stream, _):
                found.append(stream.read())
        except ModelError as error:
            found.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [b"whole", "ops@gpu-01:22: " + "e" * 2000]


def test_a_host_that_never_ends_is_left_when_the_copy_fails(peer: Peer, tmp_path: Path) -> None:
    _replace_ssh(tmp_path, "head -c 2000000 /dev/zero", "exec sleep 60")
    mine = ModelCache(str(tmp_path / "mine"), "org/model")
    before = time.monotonic()
    with pytest.raises(ModelError, match="more than the 3 bytes"):
        mine.fetch(peer, COMMIT, RemoteFile("x", 3, "a" * 64))
    assert time.monotonic() - before < 30


def test_a_damaged_blob_of_the_other_host_is_refused(peer: Peer, cache: ModelCache, tmp_path: Path) -> None:
    Path(cache.blob(hashlib.sha256(WEIGHTS).hexdigest())).write_bytes(b"?" + WEIGHTS[1:])
    with pytest.raises(ModelError, match="with hash"):
        fetch(peer, tmp_path / "mine")
    assert not (Path(ModelCache(str(tmp_path / "mine"), "org/model").folder) / "refs/main").exists()


def test_a_host_without_the_revision_is_named(peer: Peer) -> None:
    with pytest.raises(ModelError, match=r"ops@gpu-01:22: .*has no revision v2") as failure:
        peer.commit("v2")
    assert "hf_cache_peer" in failure.value.remedy


def test_the_words_of_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def refused(argv: list[str], **_: object) -> Result:
        seen.append(argv)
        return Result(255, "", "Permission denied (publickey).")

    monkeypatch.setattr(hf_peer, "run", refused)
    with pytest.raises(ModelError, match=r"ops@10\.0\.0\.1:2222: Permission denied"):
        Peer("10.0.0.1", 2222, "ops", "org/model", "/k", "/h").commit("main")
    assert seen[0][-3:] == ["--", "ops@10.0.0.1", "list main"]
    assert "StrictHostKeyChecking=yes" in seen[0] and "UserKnownHostsFile=/h" in seen[0]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"commit": COMMIT, "files": [["../../etc/x", 1, "a" * 64]]}, "it lists"),
        ({"commit": COMMIT, "files": [["x", 1, "../x"]]}, "it lists"),
        ({"commit": "../x", "files": []}, "it names the commit"),
        ({"commit": COMMIT, "files": {"x": 1}}, "no list of files"),
        ({"files": []}, "does not list the model"),
        ([1], "does not list the model"),
        ("text", "does not list the model"),
    ],
    ids=lambda each: ascii(each)[:40],
)
def test_a_hostile_host_is_refused(monkeypatch: pytest.MonkeyPatch, answer: object, found: str) -> None:
    monkeypatch.setattr(hf_peer, "run", lambda *_, **__: Result(0, json.dumps(answer), ""))
    peer = Peer("10.0.0.1", 22, "ops", "org/model", "/key", "/known")
    with pytest.raises(ModelError, match=found):
        peer.files(peer.commit("main"), ["*"])
