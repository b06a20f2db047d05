"""A host serves files to the key of another host, and nothing else; the other host trusts no byte of it."""

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.model.model_cache import ModelCache
from ansible.module_utils.mixtral_run_host.spread import archive, blobs
from ansible.module_utils.mixtral_run_host.spread import peer as peer_module
from ansible.module_utils.mixtral_run_host.spread import serve as serve_module
from ansible.module_utils.mixtral_run_host.spread.blobs import CopyError, RemoteFile
from ansible.module_utils.mixtral_run_host.spread.keys import program_text
from ansible.module_utils.mixtral_run_host.spread.peer import Peer

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


def serve(cache: ModelCache, command: str, rate: int = 0) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "SSH_ORIGINAL_COMMAND": command}
    return subprocess.run(
        [sys.executable, "-c", program_text(f"{cache.folder}/blobs", rate)],
        env=environment,
        capture_output=True,
        check=False,
    )


def test_it_gives_from_a_byte_on(cache: ModelCache) -> None:
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    assert serve(cache, f"get {digest} 0").stdout == WEIGHTS
    assert serve(cache, f"get {digest} 1000000").stdout == WEIGHTS[1000000:]


def test_it_keeps_to_its_rate(cache: ModelCache) -> None:
    began = time.monotonic()
    assert serve(cache, f"get {hashlib.sha256(WEIGHTS).hexdigest()} 0", rate=len(WEIGHTS)).stdout == WEIGHTS
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize(
    "command",
    [
        "",
        "sh",
        "list main",
        "get ../../../token 0",
        "get " + "a" * 64 + " " + "9" * 30,
        "get " + "a" * 64 + " 0; id",
        "get " + "a" * 64 + " 0\n",
    ],
)
def test_anything_else_is_refused(cache: ModelCache, command: str) -> None:
    done = serve(cache, command)
    assert (done.returncode, done.stdout) == (1, b"") and b"only get HASH START is served" in done.stderr


def test_what_is_not_there_is_reported_and_a_link_is_not_followed(cache: ModelCache, tmp_path: Path) -> None:
    assert b"No such file" in serve(cache, "get " + "a" * 40 + " 0").stderr
    Path(cache.blob("b" * 40)).symlink_to(tmp_path / "home/token")
    done = serve(cache, "get " + "b" * 40 + " 0")
    assert done.stdout == b"" and b"symbolic links" in done.stderr


def test_a_probe_finds_out_whether_files_would_be_served(cache: ModelCache, tmp_path: Path) -> None:
    done = serve(cache, "probe")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    Path(cache.folder).rename(tmp_path / "gone")
    assert b"No such file" in serve(cache, "probe").stderr


@pytest.fixture
def peer(cache: ModelCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Peer:
    """STAND-IN for ssh: the program that the key is bound to runs here. The real one is in the role's scenario."""
    programs = tmp_path / "bin"
    programs.mkdir()
    ssh = programs / "ssh"
    program = tmp_path / "program.py"
    program.write_text(program_text(f"{cache.folder}/blobs", 0))
    argv = f"{sys.executable} {program}"
    ssh.write_text(f'#!/bin/sh\nfor last; do :; done\nSSH_ORIGINAL_COMMAND="$last" exec {argv}\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return Peer("gpu-01", 22, "ops", "/key", "/known_hosts")


def fetch(peer: Peer, home: Path) -> ModelCache:
    mine = ModelCache(str(home), "org/model")
    files = [RemoteFile("model.safetensors", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())]
    for file in files:
        mine.fetch(peer, file)
    mine.publish("main", COMMIT, files)
    return mine


def test_a_model_is_taken_over_and_resumed(peer: Peer, tmp_path: Path) -> None:
    home = tmp_path / "mine"
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    partial = Path(ModelCache(str(home), "org/model").blob(digest) + ".incomplete")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(WEIGHTS[:123457])
    mine = fetch(peer, home)
    snapshot = Path(mine.folder) / "snapshots" / COMMIT
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    peer.probe()


def _replace_ssh(tmp_path: Path, *lines: str) -> None:
    (tmp_path / "bin/ssh").write_text("\n".join(["#!/bin/sh", *lines]) + "\n")


def test_a_host_that_prints_many_errors_does_not_block_the_copy(peer: Peer, tmp_path: Path) -> None:
    _replace_ssh(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' e >&2", "printf whole", "exit 3")
    found = []

    def read() -> None:
        try:
            with peer.open_file(RemoteFile("x", 5, "a" * 64), 0) as (stream, _):
                found.append(stream.read(1 << 20))
        except CopyError as error:
            found.append(str(error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert found == [b"whole", "ops@gpu-01:22: " + "e" * 2000]


def test_a_host_that_never_ends_is_left_when_the_copy_fails(peer: Peer, tmp_path: Path) -> None:
    _replace_ssh(tmp_path, "head -c 2000000 /dev/zero", "exec sleep 60")
    mine = ModelCache(str(tmp_path / "mine"), "org/model")
    before = time.monotonic()
    with pytest.raises(CopyError, match="more than the 3 bytes"):
        mine.fetch(peer, RemoteFile("x", 3, "a" * 64))
    assert time.monotonic() - before < 30


def test_a_host_that_sends_errors_for_ever_and_never_ends_is_left(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "END_SECONDS", 0.5)
    _replace_ssh(tmp_path, "printf whole", "exec >&-", "exec yes e >&2")
    written: list[object] = []
    monkeypatch.setattr(peer_module, "_ERROR_BYTES", 40)
    keep = peer_module._keep
    monkeypatch.setattr(peer_module, "_keep", lambda pipe, kept: written.append(kept) or keep(pipe, kept))
    with pytest.raises(CopyError, match="did not end"), peer.open_file(RemoteFile("x", 5, "a" * 64), 0) as (stream, _):
        assert (stream.read(1 << 20), stream.read(1 << 20)) == (b"whole", b"")
        time.sleep(0.2)
        (kept,) = written
        assert len(kept) == 40, "the source fills the disk or the memory of this host"


def test_a_silent_host_is_given_up_without_a_limit_of_the_rate_too(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_module, "IDLE_SECONDS", 0.3)
    _replace_ssh(tmp_path, "exec sleep 60")
    with pytest.raises(CopyError, match="nothing arrived"):
        fetch(peer, tmp_path / "mine")


def test_a_damaged_blob_of_the_other_host_is_refused(peer: Peer, cache: ModelCache, tmp_path: Path) -> None:
    Path(cache.blob(hashlib.sha256(WEIGHTS).hexdigest())).write_bytes(b"?" + WEIGHTS[1:])
    with pytest.raises(CopyError, match="with hash"):
        fetch(peer, tmp_path / "mine")
    assert not (Path(ModelCache(str(tmp_path / "mine"), "org/model").folder) / "refs/main").exists()


def test_the_words_of_the_connection(tmp_path: Path, peer: Peer) -> None:
    _replace_ssh(
        tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/words', "echo 'Permission denied (publickey).' >&2", "exit 255"
    )
    with pytest.raises(CopyError, match=r"ops@gpu-01:22: Permission denied") as failure:
        fetch(peer, tmp_path / "mine")
    assert "reach each other by SSH" in failure.value.remedy
    words = (tmp_path / "words").read_text().splitlines()
    assert words[-5:] == ["-l", "ops", "--", "gpu-01", f"get {hashlib.sha256(WEIGHTS).hexdigest()} 0"]
    with pytest.raises(CopyError, match=r"ops@gpu-01:22: Permission denied"):
        peer.probe()
    assert "StrictHostKeyChecking=yes" in words and "UserKnownHostsFile=/known_hosts" in words


@pytest.mark.parametrize("lines", [["exec sleep 60"], ["while printf x; do sleep 0.05; done"]], ids=["silent", "slow"])
def test_a_slow_host_is_given_up_and_what_came_is_kept(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(peer_module, "SLOW_SECONDS", 0.4)
    _replace_ssh(tmp_path, *lines)
    slow = Peer("gpu-01", 22, "ops", "/key", "/known_hosts", slowest=10_000)
    with pytest.raises(CopyError, match=r"ops@gpu-01:22: .* is slower than"):
        fetch(slow, tmp_path / "mine")
    (part,) = (tmp_path / "mine").rglob("*.incomplete")
    assert set(part.read_bytes()) <= set(b"x")


def test_ssh_as_it_is_called() -> None:
    peer = Peer("10.0.0.7", 2222, "me@x", "/k", "/hosts")
    options = [
        "BatchMode=yes", "IdentitiesOnly=yes", "StrictHostKeyChecking=yes", "UserKnownHostsFile=/hosts",
        "GlobalKnownHostsFile=/dev/null", "ConnectTimeout=20", "ServerAliveInterval=15", "Compression=no",
        "LogLevel=ERROR",
    ]  # fmt: skip
    words = [word for option in options for word in ("-o", option)]
    assert peer._argv == ["ssh", "-F", "none", "-p", "2222", "-i", "/k", *words, "-l", "me@x", "--", "10.0.0.7"]
    assert peer.target == "me@x@10.0.0.7:2222"
    assert (peer_module.SLOW_SECONDS, peer_module.IDLE_SECONDS, peer_module.END_SECONDS) == (30, 120, 30)


@pytest.mark.parametrize(
    ("slowest", "num_bytes", "words"),
    [
        # 60 bytes in 30 s are 2 each second.
        (2, 60, None),
        (2, 59, "slower than"),
        (0, 1, None),
        (2, 0, "slower than"),
        (0, 0, "nothing arrived for 120 s"),
    ],
)
def test_how_fast_a_source_must_be(
    monkeypatch: pytest.MonkeyPatch, slowest: int, num_bytes: int, words: str | None
) -> None:
    """Before 30 s are over nothing is measured, and then the next 30 s begin."""
    now, waits = [100.0], []
    reading, writing = os.pipe()
    os.write(writing, bytes(num_bytes))
    real = peer_module.select.select

    def select(pipes: list[object], *_: object) -> object:
        waits.append(_[-1])
        return real(pipes, [], [], 0)

    monkeypatch.setattr(peer_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(peer_module.select, "select", select)
    with os.fdopen(reading, "rb") as pipe:
        stream = peer_module._Measured(pipe, "host", slowest)
        if num_bytes > 1:
            now[0] = 129.9
            assert len(stream.read(1)) == 1
            num_bytes -= 1
        now[0] = 130.0
        if words:
            with pytest.raises(CopyError, match=words):
                stream.read(1000)
        else:
            assert len(stream.read(num_bytes)) == num_bytes
            assert stream._since == (130.0 if slowest else 100.0)
    os.close(writing)
    assert set(waits) == {30 if slowest else 120}


def test_a_limited_rate_is_kept_in_quarters_of_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 bytes a second: 2 at a time. The clock stands still, so that every part waits until its time has come."""
    (tmp_path / "file").write_bytes(b"0123456789")
    sent, slept = io.BytesIO(), []
    monkeypatch.setattr(serve_module.sys, "stdout", SimpleNamespace(buffer=sent))
    monkeypatch.setattr(serve_module.time, "monotonic", lambda: 50.0)
    monkeypatch.setattr(serve_module.time, "sleep", slept.append)
    serve_module.get_file(str(tmp_path / "file"), 3, 8)
    assert sent.getvalue() == b"3456789" and slept == [0.25, 0.5, 0.75, 0.875]
    slept.clear()
    serve_module.get_file(str(tmp_path / "file"), 0, 0)
    serve_module.get_file(str(tmp_path / "file"), 8, 3)  # less than one byte in a quarter of a second
    assert sent.getvalue()[7:] == b"012345678989" and slept == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


def test_figures_of_a_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = [("a", 3_000_000_000, "x"), ("b", 500_000_000, "y")]
    assert blobs.copied("it", "gpu-01", files, 7.0) == "has it: 3.5 GB from gpu-01 in 7 s (500 MB/s)"
    assert blobs.copied("it", "gpu-01", [], 0) == "has it: 0.0 GB from gpu-01 in 0 s (0 MB/s)"
    for result, expected in ((Result(0, "123\n", ""), 123), (Result(1, "123\n", ""), 0), (Result(0, "<no>", ""), 0)):
        monkeypatch.setattr(archive, "run", lambda *_, result=result, timeout: result if timeout == 30 else None)
        assert archive.image_bytes("kit") == expected
    # 8 GiB are free, of which 5 stay: an archive of 3 GiB fits.
    figures = SimpleNamespace(f_bavail=2 << 20, f_frsize=4096, f_bsize=1)
    monkeypatch.setattr(archive.os, "statvfs", lambda _: figures)
    archive.need_space("/x", 3 << 30)
    with pytest.raises(CopyError, match=r"8.0 GiB free under /x; the archive of the image takes 3.0 GiB"):
        archive.need_space("/x", (3 << 30) + 1)
    figures.f_bavail = 0
    archive.need_space("/x", 0)
    monkeypatch.setattr(archive.time, "time", lambda: 7.5)
    assert archive.image_report("gpu-01", "inputs", None) == {
        "identity": "inputs", "looked": 7.5, "holds": False,
        "content": {"id": None, "inputs": "inputs", "source": "gpu-01"},
    }  # fmt: skip
    assert archive.image_report("gpu-01", "inputs", "sha256:1")["holds"] is True
