"""The archive of an image that comes from another host: its ID follows from its bytes, and is compared first."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.spread import archive
from ansible.module_utils.mixtral_run_host.spread.archive import ImageArchive
from ansible.module_utils.mixtral_run_host.spread.blobs import CopyError
from ansible.module_utils.mixtral_run_host.spread.image_ids import ids_in

from tests.unit.host.conftest import call_module, load_module

MODULE = load_module("image_copy")
KIT = load_module("kit_image")
SOURCE = load_module("spread_source")
NEED_SPACE = archive.need_space
CONFIG = b'{"rootfs": {"diff_ids": ["sha256:1"]}}'
CONFIG_ID = "sha256:" + hashlib.sha256(CONFIG).hexdigest()
MANIFEST = json.dumps({"config": {"digest": CONFIG_ID}}).encode()
MANIFEST_ID = "sha256:" + hashlib.sha256(MANIFEST).hexdigest()


def _write(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def _id(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _members(listed: object = None, **more: bytes) -> dict[str, bytes]:
    """An archive as engines before version 25 write it, with one image without a name."""
    listed = listed or [{"Config": "config.json", "RepoTags": None, "Layers": []}]
    return {"config.json": CONFIG, "manifest.json": json.dumps(listed).encode(), **more}


def _oci(**annotations: str) -> dict[str, bytes]:
    index = {"manifests": [{"digest": MANIFEST_ID, "annotations": annotations}]}
    return _members() | {
        "index.json": json.dumps(index).encode(),
        "blobs/sha256/" + MANIFEST_ID[7:]: MANIFEST,
    }


@pytest.mark.parametrize("engine", ["docker-20.10", "docker-26.1", "docker-26.1-containerd"])
def test_the_ids_are_those_that_the_engines_gave_to_the_image(engine: str) -> None:
    """Each engine saved the same image by its ID. The IDs here are those of `docker image inspect`."""
    config = "sha256:545cc956c5db196bc9336556190f5c8386e6e9457d1bae15c328e078929a2370"
    manifest = "sha256:aafb26c3e7ac3d9fbd1b298054b2e5a3183a01dba43b3cb5a307121a410301f3"
    found = ids_in(Path(__file__).parent / "archives" / f"{engine}.tar")
    assert found == ([config] if engine == "docker-20.10" else [config, manifest])


def test_both_ids_of_an_archive_are_hashes_of_its_bytes(tmp_path: Path) -> None:
    assert ids_in(_write(tmp_path / "a", _members())) == [CONFIG_ID]
    assert ids_in(_write(tmp_path / "b", _oci())) == [CONFIG_ID, MANIFEST_ID]
    # A registry's image and one with attestations have a list of manifests.
    other = json.dumps({"config": {"digest": "sha256:" + "0" * 64}}).encode()
    proof = {"digest": _id(other), "platform": {"os": "unknown", "architecture": "unknown"}}
    elsewhere = {"digest": "sha256:" + "1" * 64, "platform": {"os": "linux", "architecture": "arm64"}}
    listed = json.dumps({"manifests": [{"digest": MANIFEST_ID}, proof, elsewhere]}).encode()
    members = _oci() | {"blobs/sha256/" + _id(each)[7:]: each for each in (other, listed)}
    members["index.json"] = json.dumps({"manifests": [{"digest": _id(listed)}]}).encode()
    assert ids_in(_write(tmp_path / "c", members)) == [CONFIG_ID, _id(listed)]
    listed = json.dumps({"manifests": [{"digest": MANIFEST_ID}, {"digest": _id(other)}]}).encode()
    members["blobs/sha256/" + _id(listed)[7:]] = listed
    members["index.json"] = json.dumps({"manifests": [{"digest": _id(listed)}]}).encode()
    with pytest.raises(CopyError, match="another image"):
        ids_in(_write(tmp_path / "d", members))


@pytest.mark.parametrize(
    "members",
    [
        _members([{"Config": "config.json", "RepoTags": ["ubuntu:24.04"]}]),
        _members([{"Config": "config.json"}, {"Config": "config.json"}]),
        _oci(**{"io.containerd.image.name": "docker.io/library/ubuntu:24.04"}),
        _members([{"Config": "../../etc/shadow"}]),
        _members({"Config": "config.json"}),
        {"manifest.json": b"nonsense"},
        {"other": b""},
    ],
    ids=["a name", "two images", "a name for containerd", "outside", "no list", "no JSON", "no manifest"],
)
def test_an_archive_of_anything_but_one_image_without_a_name_is_refused(
    tmp_path: Path, members: dict[str, bytes]
) -> None:
    with pytest.raises(CopyError) as caught:
        ids_in(_write(tmp_path / "a", members))
    assert "nothing was loaded" in caught.value.remedy
    (tmp_path / "b").write_bytes(b"no archive at all")
    with pytest.raises(CopyError, match="no archive"):
        ids_in(tmp_path / "b")


def _split() -> dict[str, bytes]:
    """The image of manifest.json is the right one, and that of index.json, which other engines load, is not."""
    evil = json.dumps({"config": {"digest": "sha256:" + "e" * 64}}).encode()
    index = json.dumps({"manifests": [{"digest": _id(evil)}]}).encode()
    return _oci() | {"blobs/sha256/" + _id(evil)[7:]: evil, "index.json": index}


NAMED = json.dumps([{"Config": "config.json", "RepoTags": ["ubuntu:24.04"]}]).encode()


@pytest.mark.parametrize(
    "members",
    [
        _split(),
        _oci() | {"blobs/sha256/" + MANIFEST_ID[7:]: b"{}"},
        _members() | {"./manifest.json": NAMED},
        _members() | {"/manifest.json": NAMED},
        _members() | {"x/../manifest.json": NAMED},
        _members([{"Config": "config.json", "repotags": ["ubuntu:24.04"]}]),
        _members([{"Config": "config.json", "RepoTag\u017f": ["ubuntu:24.04"]}]),
        _members() | {"manifest.json": b'[{"Config": "x", "Config": "config.json"}]'},
    ],
    ids=["two images", "wrong hash", "./", "/", "..", "case", "folded case", "key twice"],
)
def test_an_archive_that_engines_read_in_another_way_is_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(CopyError) as caught:
        ids_in(_write(tmp_path / "a", members))
    assert "nothing was loaded" in caught.value.remedy


@pytest.mark.parametrize("kind", ["link", "link as folder", "twice", "compressed", "after its end"])
def test_an_archive_with_odd_members_is_refused(tmp_path: Path, kind: str) -> None:
    path = _write(tmp_path / "a", _members() | ({"x/y": b""} if kind == "link as folder" else {}))
    if kind == "compressed":
        path.write_bytes(gzip.compress(path.read_bytes()))
    elif kind == "after its end":
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 1024] + b"x" * 512)
    else:
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo({"twice": "manifest.json", "link": "index.json"}.get(kind, "x"))
            if kind != "twice":
                member.type, member.linkname = tarfile.SYMTYPE, "other"
            tar.addfile(member)
    with pytest.raises(CopyError, match="no archive of one image"):
        ids_in(path)


class Engine:
    """STAND-IN for an engine: it notes what is loaded, and saves an archive of one image."""

    def __init__(self, known: str) -> None:
        self.calls: list[list[str]] = []
        self.known, self.loaded = known, ""

    def run(self, argv: list[str], **_: object) -> Result:
        self.calls.append(argv)
        if argv[1] == "save":
            _write(Path(argv[3]), _members())
        if argv[1] == "load":
            return Result(0, self.loaded, "")
        there = argv[1] != "image" or argv[-1] == self.known
        return Result(int(not there), self.known if "{{.Id}}" in argv else "1000", "")

    def verbs(self) -> list[str]:
        return [argv[1] for argv in self.calls if argv[1] != "image"]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    found = Engine(CONFIG_ID)
    for module in (MODULE, archive):
        monkeypatch.setattr(module, "run", found.run)
        monkeypatch.setattr(module, "need_space", lambda *_: None)
    monkeypatch.setattr(archive, "FOLDER", str(tmp_path / "spread"))
    return found


def _copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes], **more: Any) -> dict[str, Any]:
    data = _write(tmp_path / "theirs.tar", members).read_bytes()

    class Peer:
        """STAND-IN for another host: it gives these bytes."""

        @contextlib.contextmanager
        def open_file(self, file: Any, start: int) -> Iterator[tuple[io.BytesIO, bool]]:
            yield io.BytesIO(data[start:]), True

    monkeypatch.setattr(MODULE, "connected", lambda *_: contextlib.nullcontext(Peer()))
    file = [CONFIG_ID, len(data), hashlib.sha256(data).hexdigest()]
    content = {"id": CONFIG_ID, "inputs": "same", "source": "build"}
    return call_module(
        MODULE,
        tmp_path / "records",
        host="gpu-02",
        name="kit:local",
        peer="gpu-01",
        **{"content": content, "file": file} | more,
    )


def test_an_image_is_loaded_named_and_recorded_and_its_archive_serves_others(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _copy(tmp_path, monkeypatch, _members())
    assert engine.verbs() == ["load", "tag"] and engine.calls[-1] == ["docker", "tag", CONFIG_ID, "kit:local"]
    assert (found["spread"]["holds"], found["spread"]["identity"]) == (True, "same")
    assert found["spread"]["content"] == {"id": CONFIG_ID, "inputs": "same", "source": "build"}
    record = json.loads((tmp_path / "records/images.json").read_text())
    assert record == {"kit:local": {"id": CONFIG_ID, "inputs": "same", "source": "build"}}
    assert (
        ImageArchive().save(CONFIG_ID, os.getegid()).digest == found_digest(tmp_path) and "save" not in engine.verbs()
    )
    assert ImageArchive().remove() and not (tmp_path / "spread").exists()


def found_digest(tmp_path: Path) -> str:
    return hashlib.sha256((tmp_path / "theirs.tar").read_bytes()).hexdigest()


def test_an_engine_with_a_manifest_of_its_own_says_its_id(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker 26.1 with its images in containerd loads an archive of Docker 20.10, and gives it another ID."""
    own = engine.known = "sha256:6e4679706cf7d636958978ec317897ca280035475b9cab09ec4c64782e84f6e7"
    engine.loaded = f"Loaded image ID: {own}\n"
    found = _copy(tmp_path, monkeypatch, _members())
    assert engine.calls[-1] == ["docker", "tag", own, "kit:local"] and found["image"]["id"] == own
    assert found["spread"]["content"]["id"] == CONFIG_ID, "the name by which the hosts of the fleet know it"


@pytest.mark.parametrize(
    ("members", "more", "words"),
    [
        (_members() | {"config.json": b"{}"}, {}, "nothing was loaded"),
        (_members([{"Config": "config.json", "RepoTags": ["ubuntu:24.04"]}]), {}, "names for one"),
        (_members(), {"content": {"id": "ubuntu:24.04"}}, "no ID of an image"),
        (_members(), {"file": ["x", 1, "../../x"]}, "it lists"),
        (_members(), {"file": ["x", 5, "a" * 64]}, "more than the 5 bytes"),
        (_members(), {"peer_problem": "it serves 2 already"}, "it serves 2 already"),
    ],
    ids=["another image", "a name", "no ID", "a path", "other bytes", "busy"],
)
def test_nothing_of_a_hostile_host_is_loaded(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict, more: dict, words: str
) -> None:
    found = _copy(tmp_path, monkeypatch, members, **more)
    assert found["failed"] and words in found["found"] and "next:" in found["msg"]
    assert engine.verbs() == [] and not (tmp_path / "records").exists()
    assert not [path for path in (tmp_path / "spread").rglob("*") if path.is_file()]


def test_a_fault_of_this_host_is_not_blamed_on_the_source(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(argv: list[str], **_: object) -> Result:
        return Result(1, "", "no such engine")

    monkeypatch.setattr(MODULE, "run", refuse)
    found = _copy(tmp_path, monkeypatch, _members())
    assert found["found"] == "docker load: no such engine" and found["blame"] == "nobody"
    shutil.rmtree(tmp_path / "spread")
    monkeypatch.setattr(MODULE, "need_space", NEED_SPACE)
    monkeypatch.setattr(archive, "SPARE_GIB", 1 << 40)
    found = _copy(tmp_path, monkeypatch, _members(), file=["x", 5, "a" * 64])
    assert "GiB free" in found["found"] and found["blame"] == "me"
    assert _copy(tmp_path, monkeypatch, _members(), peer_problem="it is gone")["blame"] == "source"


def test_an_archive_is_removed_when_nobody_is_about_to_serve_it(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = ImageArchive()
    assert not archives.remove() and not archives.exists()
    for left in ("saved-1", "saved-2"):  # of a killed run
        (tmp_path / "spread/blobs").mkdir(parents=True, exist_ok=True)
        (tmp_path / "spread/blobs" / left).write_bytes(b"x" * 9)
    archives.save(CONFIG_ID, os.getegid())
    assert len(list((tmp_path / "spread/blobs").iterdir())) == 1
    with archives.locked():
        assert not ImageArchive().remove(list) and archives.exists()
    assert not archives.remove(lambda: ["gpu-02"]) and archives.exists()
    monkeypatch.setattr(SOURCE, "Doors", None)  # the login user may be gone
    given = {"state": "finished", "force": True}
    assert call_module(SOURCE, tmp_path, check_mode=True, **given)["changed"] and archives.exists()
    assert call_module(SOURCE, tmp_path, **given)["changed"] and not archives.exists()
    assert not call_module(SOURCE, tmp_path, **given)["changed"]


def test_the_archive_stays_locked_until_the_key_exists(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []

    class Doors:
        """STAND-IN for the keys: while one is made, another process tries to remove the archive."""

        gid, name = os.getegid(), "ops"

        def __init__(self, *_: str) -> None: ...

        def open(self, *_: object) -> tuple[str, None]:
            found.append(ImageArchive().remove(list))
            return "key", None

    monkeypatch.setattr(SOURCE, "Doors", Doors)
    given = {"asker": "gpu-02", "image": CONFIG_ID}
    first = call_module(SOURCE, tmp_path, state="open", **given)
    assert first["num_bytes"] == 1000 and engine.verbs() == [], "it is saved after the other host tried the connection"
    saved, again = (call_module(SOURCE, tmp_path, state="saved", **given) for _ in range(2))
    assert saved["file"] == again["file"] and (saved["changed"], again["changed"]) == (True, False)
    answer = call_module(SOURCE, tmp_path, state="open", **given)
    assert found == [False, False] and answer["file"] == saved["file"] and answer["file"][0] == CONFIG_ID
    assert engine.verbs() == ["save"] and ImageArchive().exists()


def test_a_source_without_the_image_or_the_space_says_so_before_anything_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SOURCE, "Doors", lambda *_: None)
    given = {"state": "open", "asker": "gpu-02"}
    found = call_module(SOURCE, tmp_path, image="sha256:" + "0" * 64, **given)
    assert "does not have the image sha256:000" in found["problem"] and "private_key" not in found
    monkeypatch.setattr(archive, "need_space", NEED_SPACE)
    monkeypatch.setattr(archive, "SPARE_GIB", 1 << 40)
    assert "GiB free" in call_module(SOURCE, tmp_path, image=CONFIG_ID, **given)["problem"]
    assert not (tmp_path / "spread").exists()


def test_connection_and_space_are_tried_before_the_source_saves_its_image(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers: list[CopyError | None] = [CopyError("ops@gpu-01:22: Permission denied", "look there"), None]

    class Peer:
        """STAND-IN for another host that is reached at the second time."""

        def probe(self) -> None:
            if (problem := answers.pop(0)) is not None:
                raise problem

    monkeypatch.setattr(MODULE, "connected", lambda *_: contextlib.nullcontext(Peer()))
    given = {"host": "gpu-02", "name": "kit:local", "peer": "gpu-01", "content": {"id": CONFIG_ID}, "probe": True}
    found = call_module(MODULE, tmp_path, num_bytes=10**9, **given)
    assert found["failed"] and (found["found"], found["blame"]) == ("ops@gpu-01:22: Permission denied", "source")
    # The role takes a message for a failure.
    assert call_module(MODULE, tmp_path, num_bytes=10**9, **given) == {"changed": False}
    monkeypatch.setattr(MODULE, "need_space", NEED_SPACE)
    found = call_module(MODULE, tmp_path, num_bytes=1 << 60, **given)
    assert "the archive of the image takes" in found["found"] and found["blame"] == "me"
    assert engine.calls == [] and not (tmp_path / "spread").exists()


def test_an_image_is_saved_once_by_its_id(engine: Engine, tmp_path: Path) -> None:
    first, second = (ImageArchive().save(CONFIG_ID, os.getegid()) for _ in range(2))
    assert first == second and engine.verbs() == ["save"]
    assert engine.calls[1][-1] == CONFIG_ID, "saved by a name, its load would move the name"
    (blob,) = (tmp_path / "spread/blobs").iterdir()
    assert blob.name == first.digest == hashlib.sha256(blob.read_bytes()).hexdigest()


@pytest.mark.parametrize("source", ["build", "registry", "archive"])
def test_a_look_says_what_would_be_the_same_image_and_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    calls: list[str] = []

    def run(argv: list[str], **_: object) -> Result:
        calls.append(argv[1])
        return Result(1, "", "")

    monkeypatch.setattr(KIT, "run", run)
    given = {
        "source": source, "name": "kit:local", "inputs": "i", "variant": "cpu", "user": "no-such-user", "look": True,
        "registry_reference": "kit@sha256:" + "a" * 64,
    }  # fmt: skip
    reports = [call_module(KIT, tmp_path, host=f"gpu-0{number}", **given) for number in (1, 2)]
    assert set(calls) == {"image"} and not any(each["changed"] or each["spread"]["holds"] for each in reports)
    assert reports[0]["spread"]["identity"] == reports[1]["spread"]["identity"] != ""


def test_an_image_of_a_registry_that_another_host_gave_is_not_pulled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = "kit@sha256:" + "a" * 64
    (tmp_path / "images.json").write_text(json.dumps({"kit:local": {"id": "v1", "inputs": reference}}))

    def run(argv: list[str], **_: object) -> Result:
        there = argv[-1] == "kit:local"
        return Result(int(not there), '[{"Id": "v1"}]' if there else "", "")

    monkeypatch.setattr(KIT, "run", run)
    given = {"host": "gpu-01", "source": "registry", "name": "kit:local", "inputs": "", "registry_reference": reference}
    assert not call_module(KIT, tmp_path, **given)["changed"]
