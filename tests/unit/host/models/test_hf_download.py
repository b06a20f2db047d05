"""A model is downloaded by the `hf` of the kit's image: the real program against a small hub; docker is a stand-in."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.model import hf_download
from ansible.module_utils.mixtral_run_host.model.hf_download import HubDownload
from ansible.module_utils.mixtral_run_host.spread.blobs import CopyError

from tests.support.servers.hub_server import COMMIT, NAME, Hub, serving
from tests.unit.host.conftest import call_module, load_module
from tests.unit.host.programs import Programs

MODULE = load_module("hf_model")
# STAND-IN for an engine: `run` starts the program of this machine, with the container's variables and its mounted home.
DOCKER = r"""
import os, subprocess, sys
words = sys.argv[1:]
if words[0] == "wait":
    sys.exit(1)
if words[0] == "image":
    sys.exit(int(os.path.exists(os.environ["NO_IMAGE"])))
environment, home = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}, ""
while words[0] != "hf":
    word = words.pop(0)
    if word == "--env":
        name, given, value = words.pop(0).partition("=")
        environment[name] = value if given else os.environ[name]
    elif word == "--mount":
        parts = dict(each.partition("=")[::2] for each in words.pop(0).split(","))
        home = parts["source"] if parts["target"] == "/huggingface" else home
places = {"/huggingface": home, "/tmp/listing": home + "-listing"}
for place, folder in places.items():
    environment = {name: value.replace(place, folder) for name, value in environment.items()}
done = subprocess.run([os.path.join(os.path.dirname(sys.executable), "hf"), *words[1:]],
                      env={**environment, "HF_HUB_DISABLE_XET": "1", "HF_HUB_ETAG_TIMEOUT": "5"})
sys.exit(done.returncode)
"""


class Host:
    """A host whose docker is the stand-in, and the hub that it asks."""

    def __init__(self, folder: Path, hub: Hub, programs: Programs) -> None:
        self.home, self.hub, self.programs, self._folder = folder / "home", hub, programs, folder
        self.home.mkdir()

    def take(self, **more: Any) -> dict[str, Any]:
        return call_module(
            MODULE, self._folder / "records", host="gpu-01", home=str(self.home), model=NAME,
            patterns=["*.json", "*.safetensors"], endpoint=self.hub.url, uid=os.geteuid(), gid=os.getegid(), **more,
        )  # fmt: skip

    def files(self) -> dict[str, bytes]:
        folder = self.home / "hub" / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
        return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    programs = Programs(tmp_path)
    monkeypatch.setenv("PATH", f"{programs.folder}:/usr/bin:/bin")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"a": 1}')
    (model / "model-1.safetensors").write_bytes(os.urandom(300_000))
    (model / "consolidated.00.pth").write_bytes(b"not wanted")
    script = tmp_path / "docker.py"
    script.write_text(DOCKER)
    programs.put("docker", f'exec {sys.executable} {script} "$@"')
    monkeypatch.setenv("NO_IMAGE", str(tmp_path / "no-image"))
    with serving(model) as hub:
        yield Host(tmp_path, hub, programs)


def test_the_model_is_downloaded_once(host: Host) -> None:
    (host.home / "token").write_text("hf_secret")
    found = host.take()
    assert found["changed"] and found["commit"] == COMMIT and found["files"] == 2
    wanted = ("config.json", "model-1.safetensors")
    assert host.files() == {name: (host.hub.folder / name).read_bytes() for name in wanted}
    assert "Bearer hf_secret" in host.hub.tokens and "hf_secret" not in "\n".join(host.programs.calls())
    calls = len(host.programs.calls())
    again = host.take()
    assert (again["changed"], again["commit"], again["files"]) == (False, COMMIT, 2)
    assert len(host.programs.calls()) == calls  # nothing was asked again


def test_an_interrupted_download_continues(host: Host) -> None:
    host.hub.cut = "model-1.safetensors"
    for _ in range(3):  # hf may itself try again
        found = host.take()
        if not found.get("failed"):
            break
        assert "run again" in found["msg"]
    assert host.files()["model-1.safetensors"] == (host.hub.folder / "model-1.safetensors").read_bytes()


def test_check_mode_downloads_nothing(host: Host) -> None:
    assert host.take(check_mode=True)["changed"]
    assert list(host.home.iterdir()) == [] and host.hub.sent == []


def test_files_that_arrive_wrong_are_removed(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub names the file by another hash than that of its bytes."""
    real = hf_download.run

    def damaging(argv: list[str], **more: Any) -> Result:
        done = real(argv, **more)
        if argv[:2] == ["docker", "run"] and "--dry-run" not in argv:
            for blob in host.home.glob("hub/*/blobs/*"):
                blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        return done

    monkeypatch.setattr(hf_download, "run", damaging)
    found = host.take()
    assert found["failed"] and "expected a file with hash" in found["msg"]
    monkeypatch.setattr(hf_download, "run", real)
    for _ in range(2):  # the first file with a wrong hash ends a run
        found = host.take()
    assert host.files()["config.json"] == b'{"a": 1}'


@pytest.mark.parametrize(
    ("state", "more", "words"),
    [
        ("gated", {}, ("is gated", "hf_cache_token_file")),
        ("missing", {}, ("not found", "check hf_cache_model and")),
        ("open", {"revision": "nope"}, ("Revision not found", "hf_cache_model_revision")),
        ("open", {"patterns": ["*.gguf"]}, ("no file of the model matches", "hf_cache_model_patterns")),
        ("open", {"endpoint": "http://127.0.0.1:9"}, ("hf_cache_endpoint", "hf_cache_model_path")),
    ],
)
def test_what_the_hub_refuses_is_reported(host: Host, state: str, more: dict[str, Any], words: tuple[str, ...]) -> None:
    host.hub.state = state
    values = {
        "host": "gpu-01", "home": str(host.home), "model": NAME, "patterns": ["*.json"], "endpoint": host.hub.url,
        "uid": os.geteuid(), "gid": os.getegid(), **more,
    }  # fmt: skip
    found = call_module(MODULE, host.home / "records", **values)
    assert found["failed"] and all(word in found["msg"] for word in words), found["msg"]
    assert "\x1b" not in found["msg"] and "skills add" not in found["msg"]


def test_without_the_image_the_role_to_run_is_named(host: Host, tmp_path: Path) -> None:
    (tmp_path / "no-image").touch()
    found = host.take()
    assert found["failed"] and "run the docker and image roles first" in found["msg"]
    assert host.take(check_mode=True)["changed"]  # a bare host: the image would be there by then


def test_a_full_disk_is_found_before_the_download(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "SPARE_GIB", 10**9)
    found = host.take()
    assert found["failed"] and "GiB free" in found["msg"] and host.hub.sent == []


@pytest.mark.parametrize(("no_proxy", "answers"), [("localhost,127.0.0.1", True), ("localhost", False)])
def test_a_proxy_is_used_but_for_hosts_that_no_proxy_names(host: Host, no_proxy: str, answers: bool) -> None:
    found = host.take(proxy="http://127.0.0.1:9", no_proxy=no_proxy)
    assert bool(found.get("failed")) is not answers and bool(host.hub.sent) is answers


def test_the_proxy_is_no_word_of_the_command_line() -> None:
    download = HubDownload(
        "image", "/hf", "org/model", "main", ["*.json"], "https://hub", "http://me:secret@proxy", "localhost", 1, 2
    )
    argv = download.argv([])
    assert "secret" not in " ".join(argv)
    assert argv[argv.index("HTTPS_PROXY") - 1 : argv.index("HTTPS_PROXY") + 1] == ["--env", "HTTPS_PROXY"]
    assert argv[argv.index("--user") + 1] == "1:2" and "no-new-privileges" in argv


def test_one_download_as_docker_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_download.os.path, "isfile", lambda _: False)
    download = HubDownload("image", "/hf", "org/a b", "main", ["*.json", "*.bin"], "https://hub", "", "x", 1, 2)
    own = [
        "docker", "run", "--rm", "--network", "host", "--user", "1:2", "--cap-drop", "ALL", "--security-opt",
        "no-new-privileges", "--pids-limit", "4096", "--read-only", "--tmpfs", "/tmp:mode=1777", "--tmpfs",
        "/home/mixtral:mode=1777",
    ]  # fmt: skip
    home = hf_download.HOME
    shared = [
        "--env", f"HF_HOME={home}", "--env", f"HF_TOKEN_PATH={home}/token", "--env", "HF_ENDPOINT=https://hub",
        "--env", "HF_HUB_DISABLE_TELEMETRY=1", "--env", "HF_HUB_DISABLE_UPDATE_CHECK=1", "image", "hf", "download",
        "org/a b", "--revision", "main", "--json", "--include", "*.json", "--include", "*.bin",
    ]  # fmt: skip
    mount = f"type=bind,source=/hf,target={home}"
    assert download.argv([], "name") == [*own, "--name", "name", "--mount", mount, *shared]
    listing = [*own, "--mount", mount + ",readonly", "--env", "HF_HUB_CACHE=/tmp/listing", *shared, "--dry-run"]
    assert download.argv(["--dry-run"], listing=True) == listing
    asked: list[tuple[str, float]] = []

    def run(argv: list[str], timeout: float, environment: object = None) -> Result:
        asked.append((" ".join(argv[:3]), timeout))
        return Result(0, "[]" if "--dry-run" in argv else "{}", "")

    monkeypatch.setattr(hf_download, "run", run)
    assert download.missing_image() is None
    for act in (download.missing_bytes, download.fetch):
        with pytest.raises(CopyError):
            act()
    assert asked == [
        ("docker image inspect", 60), ("docker run --rm", 300),
        ("docker wait mixtral-run-model-org-a-b", 604800), ("docker run --rm", 604800),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3.0M", 3e6),
        ("1K", 1e3),
        ("2.5G", 2.5e9),
        ("1.5T", 1.5e12),
        ("12", 12.0),
        ("-", 0.0),
        ("3MB", 0.0),
        (None, 0.0),
    ],
)
def test_sizes_that_hf_prints(text: str | None, size: float) -> None:
    assert hf_download._size_of(text) == size


@pytest.mark.parametrize(
    ("code", "said", "words"),
    [
        (124, "", "run again: the download continues"),
        (125, "anything", "run the docker and image roles"),
        (1, "403 Client Error", "is gated"),
        (1, "429 Too Many Requests", "the hub limits requests"),
        (1, "Rate limit reached", "the hub limits requests"),
        (1, "Repository Not found", "check hf_cache_model and"),
        (1, "Local entry not found", "name a mirror"),
        (1, "odd", "name a mirror"),
    ],
)
def test_what_to_do_about_a_download_that_fails(code: int, said: str, words: str) -> None:
    download = HubDownload("image", "/hf", "org/model", "main", [], "https://hub", "", "", 1, 2)
    assert words in download._remedy(Result(code, "", ""), said)
    assert hf_download._plain("\x1b[31ma\x1b[0m\n\nb\nHint: x\nc\nd\ne\n") == "b\nc\nd\ne"
