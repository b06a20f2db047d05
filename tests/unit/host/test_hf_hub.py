"""Fetching a model from a hub that breaks off, lies and limits: what arrives is whole, or nothing is published."""

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.client import IncompleteRead
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.hf_hub import (
    Hub,
    HubError,
    ModelCache,
    RemoteFile,
    checked_commit,
    checked_files,
    digest_of,
)

COMMIT = "c" * 40
MODEL = "org/model"


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub(ThreadingHTTPServer):
    """STAND-IN for the hub's three addresses that the kit asks."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {
            "config.json": b'{"a": 1}',
            "model-1.safetensors": bytes(range(256)) * 9000,
            "sub/x.bin": b"not wanted",
        }
        self.break_off_after: int | None = None
        self.cut_listing: str | None = None
        self.corrupt = False
        self.token: str | None = None
        self.seen: list[tuple[str, str | None, str | None]] = []
        self.redirect_to: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _json(self, value: object, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        cut = self.server.cut_listing and self.server.cut_listing in self.path
        self.wfile.write(data[:-5] if cut else data)
        self.close_connection = bool(cut) or self.close_connection

    def do_GET(self) -> None:
        hub = self.server
        hub.seen.append((self.path, self.headers.get("Authorization"), self.headers.get("Range")))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/revision/" in self.path:
            self._json({"sha": COMMIT})
        elif "/tree/" in self.path:
            # Two pages, as the hub gives long listings.
            names = sorted(hub.files)
            page = [names[:1], names[1:]]["page=2" in self.path]
            link = {} if "page=2" in self.path else {"Link": f'<{hub.url}{self.path}&page=2>; rel="next"'}
            self._json(
                [{"type": "directory", "path": "sub"}, *(_entry(name, hub.files[name]) for name in page)], **link
            )
        else:
            self._file(hub)

    def _file(self, hub: FakeHub) -> None:
        name = self.path.split(f"/resolve/{COMMIT}/")[1]
        if hub.redirect_to:
            self.send_response(302)
            self.send_header("Location", hub.redirect_to + self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = hub.files[name]
        if hub.corrupt:
            data = data[:-1] + b"?"
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        end = len(data) if hub.break_off_after is None else min(len(data), start + hub.break_off_after)
        self.wfile.write(data[start:end])
        self.close_connection = True


def _entry(name: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": _git_hash(data)}
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return entry


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def _fetch(hub: FakeHub, home: Path, token: str | None = None) -> ModelCache:
    client, cache = Hub(hub.url, MODEL, token), ModelCache(str(home), MODEL)
    commit = client.commit("main")
    files = client.files(commit, ["*.json", "*.safetensors"])
    for file in files:
        if not cache.has(file):
            cache.fetch(client, commit, file)
    cache.publish("main", commit, files)
    return cache


def test_the_cache_is_laid_out_as_huggingface_hub_reads_it(hub: FakeHub, tmp_path: Path) -> None:
    _fetch(hub, tmp_path)
    from huggingface_hub import snapshot_download

    found = Path(snapshot_download(MODEL, cache_dir=tmp_path / "hub", local_files_only=True))
    assert {path.name for path in found.iterdir()} == {"config.json", "model-1.safetensors"}
    assert (found / "model-1.safetensors").read_bytes() == hub.files["model-1.safetensors"]


def test_a_second_publication_changes_nothing(hub: FakeHub, tmp_path: Path) -> None:
    cache = _fetch(hub, tmp_path)
    files = Hub(hub.url, MODEL).files(COMMIT, ["*.json"])
    assert cache.publish("main", COMMIT, files) is False


def test_it_goes_on_where_it_stopped(hub: FakeHub, tmp_path: Path) -> None:
    hub.break_off_after = 1_000_000
    for _ in range(2):
        with pytest.raises(HubError, match=r"model-1\.safetensors: .*(bytes arrived|broke off)") as failure:
            _fetch(hub, tmp_path)
        assert "it goes on there" in failure.value.remedy
    assert not (tmp_path / "hub/models--org--model/refs/main").exists()
    hub.break_off_after = None
    _fetch(hub, tmp_path)
    ranges = [asked for _, _, asked in hub.seen if asked]
    assert ranges and ranges[-1] == "bytes=2000000-"


class BreakingSource:
    """STAND-IN for a connection that ends with an error instead of the file's end."""

    def __init__(self, data: bytes, error: Exception | None) -> None:
        self.data, self.error = data, error

    @contextlib.contextmanager
    def open_file(self, _commit: str, _file: RemoteFile, start: int) -> Iterator[tuple[io.BytesIO, bool]]:
        stream, error = io.BytesIO(self.data[start:]), self.error

        class Stream(io.BytesIO):
            def read(self, _size: int | None = -1) -> bytes:
                found = stream.read(1000)
                if not found and error:
                    raise error
                return found

        yield Stream(), True


@pytest.mark.parametrize(
    ("error", "more"),
    [(ConnectionResetError("reset"), b""), (TimeoutError(), b""), (IncompleteRead(b"abc", 9), b"abc")],
)
def test_a_connection_that_breaks_off_is_told_and_what_came_is_kept(
    tmp_path: Path, error: Exception, more: bytes
) -> None:
    data = bytes(range(256)) * 20 + b"abcdef"
    file = RemoteFile("w.safetensors", len(data), hashlib.sha256(data).hexdigest())
    cache = ModelCache(str(tmp_path), MODEL)
    with pytest.raises(HubError, match=r"w\.safetensors: the connection broke off") as failure:
        cache.fetch(BreakingSource(data[:-6], error), COMMIT, file)
    assert "it goes on there" in failure.value.remedy
    assert Path(cache.blob(file.digest) + ".incomplete").read_bytes() == data[:-6] + more
    cache.fetch(BreakingSource(data, None), COMMIT, file)
    assert Path(cache.blob(file.digest)).read_bytes() == data


@pytest.mark.parametrize("asked", ["/revision/", "/tree/"])
def test_a_listing_that_is_cut_off_is_told(hub: FakeHub, tmp_path: Path, asked: str) -> None:
    hub.cut_listing = asked
    with pytest.raises(HubError, match=f"{asked}.*(not whole|broke off)"):
        _fetch(hub, tmp_path)


def test_wrong_bytes_are_thrown_away_and_told(hub: FakeHub, tmp_path: Path) -> None:
    hub.corrupt = True
    with pytest.raises(HubError, match="with hash") as failure:
        _fetch(hub, tmp_path)
    assert "anew" in failure.value.remedy
    assert not list((tmp_path / "hub/models--org--model/blobs").iterdir())
    hub.corrupt = False
    _fetch(hub, tmp_path)


def test_a_gated_model_says_what_to_do(hub: FakeHub, tmp_path: Path) -> None:
    hub.token = "hf_secret"
    with pytest.raises(HubError, match="401") as failure:
        _fetch(hub, tmp_path)
    assert "license" in failure.value.remedy and "hf_cache_token_file" in failure.value.remedy
    _fetch(hub, tmp_path, token="hf_secret")


def test_the_token_does_not_follow_to_another_host(hub: FakeHub, tmp_path: Path) -> None:
    store = FakeHub()
    threading.Thread(target=store.serve_forever, args=(0.02,), daemon=True).start()
    hub.redirect_to = f"http://localhost:{store.server_address[1]}"
    _fetch(hub, tmp_path, token="hf_secret")
    store.shutdown()
    store.server_close()
    assert store.seen and all(token is None for _, token, _ in store.seen)
    assert all(token == "Bearer hf_secret" for _, token, _ in hub.seen)


def test_hashes_are_gits_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_of(str(tmp_path / "x"), "0" * 40) == _git_hash(b"abc")
    assert digest_of(str(tmp_path / "x"), "0" * 64) == hashlib.sha256(b"abc").hexdigest()


def test_an_unreachable_hub_is_told(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9"):
        Hub("http://127.0.0.1:9", MODEL, timeout=2).commit("main")


HOSTILE_FILES = [
    ["../../../etc/cron.d/x.json", 4, "a" * 64],
    ["/etc/x.json", 4, "a" * 64],
    ["a//x.json", 4, "a" * 64],
    ["./x.json", 4, "a" * 64],
    ["a/../../x.json", 4, "a" * 64],
    ["x\nroot.json", 4, "a" * 64],
    ["x\x1b[2J.json", 4, "a" * 64],
    ["..\\x.json", 4, "a" * 64],
    ["", 4, "a" * 64],
    ["x" * 2000 + ".json", 4, "a" * 64],
    ["x.json", 4, "../../../../root/.ssh/authorized_keys"],
    ["x.json", 4, "a" * 64 + "\n"],
    ["x.json", 4, ["a"]],
    ["x.json", -1, "a" * 64],
    ["x.json", "4", "a" * 64],
    [["x.json"], 4, "a" * 64],
    ["x.json", 4],
    "x.json",
    None,
]


@pytest.mark.parametrize("listed", HOSTILE_FILES, ids=lambda each: ascii(each)[:40])
def test_names_that_would_leave_the_cache_are_refused(listed: object) -> None:
    good = ["config.json", 4, "b" * 40]
    assert checked_files([good], "hub")[0].path == "config.json"
    with pytest.raises(HubError, match="hub: it lists") as caught:
        checked_files([good, listed], "hub")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


def test_a_file_that_is_a_folder_of_another_is_refused() -> None:
    """The first would be a link into blobs/, through which the second would be written."""
    with pytest.raises(HubError, match="'a/b' as a file and as a folder"):
        checked_files([["a/b", 1, "a" * 40], ["a/b/c", 1, "b" * 40]], "hub")


@pytest.mark.parametrize("commit", ["../../x", "main", "A" * 40, "a" * 40 + "\n", None, 7, ["a" * 40]])
def test_a_commit_is_a_hash(commit: object) -> None:
    with pytest.raises(HubError, match="it names the commit"):
        checked_commit(commit, "hub")


def test_what_a_hostile_hub_lists_ends_the_fetch(hub: FakeHub) -> None:
    hub.files = {"../../../../escaped.json": b"{}"}
    source = Hub(hub.url, MODEL)
    with pytest.raises(HubError, match="it lists"):
        source.files(source.commit("main"), ["*"])
