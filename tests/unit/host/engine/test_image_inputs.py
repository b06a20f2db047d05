"""What the image is made from is known by hash: the base image, the packages, the archive; and the image says so."""

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.engine import image_inputs

from mixtral_run.fleet.testhosts import kit_image
from tests.unit.host.conftest import ROOT, call_module, load_action, load_module

MODULE = load_module("kit_image")
DIGEST = "sha256:" + "5" * 64
MOVED = "sha256:" + "6" * 64
BILL = "b" * 64
Build = Callable[..., dict[str, Any]]


class Engine:
    """STAND-IN for the engine: images by name, and the command lines that it was given."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.images: dict[str, dict[str, Any]] = {}
        self.registry: dict[str, dict[str, Any]] = {}
        self.pull_error = "manifest unknown"

    def run(self, argv: list[str], **_: object) -> Result:
        self.calls.append(argv)
        name = argv[-1]
        if argv[1] == "pull":
            if name not in self.registry:
                return Result(1, "", self.pull_error)
            self.images[name] = self.registry[name]
        elif argv[1] == "build":
            tag = argv[argv.index("--tag") + 1]
            words = [argv[place + 1] for place, word in enumerate(argv) if word == "--label"]
            self.images[tag] = {"Id": "built", "Config": {"Labels": dict(word.split("=", 1) for word in words)}}
        elif argv[1] == "run":
            return Result(0, f"{BILL}  {argv[-1]}\n", "")
        elif argv[1] == "load":
            self.images["kit:archive"] = {"Id": "loaded"}
        elif argv[1] == "tag":
            self.images[argv[3]] = self.images[argv[2]]
        elif argv[1:3] == ["image", "inspect"]:
            found = self.images.get(name)
            return Result(int(found is None), json.dumps([found]), "")
        return Result(0, "", "")

    def arguments(self) -> dict[str, str]:
        (argv,) = [argv for argv in self.calls if argv[1] == "build" and "--build-arg" in argv]
        return dict(argv[place + 1].split("=", 1) for place, word in enumerate(argv) if word == "--build-arg")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    found = Engine()
    found.registry["ubuntu:24.04"] = {"Id": "sha256:1d", "RepoDigests": [f"ubuntu@{DIGEST}"]}
    monkeypatch.setattr(MODULE, "run", found.run)
    return found


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(MODULE.image_inputs, "BLOCK", 3)
    from ansible.module_utils.basic import AnsibleModule

    monkeypatch.setattr(AnsibleModule, "warn", lambda _self, text, **_: found.append(text))
    return found


@pytest.fixture
def build(engine: Engine, tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch) -> Build:
    monkeypatch.setattr(MODULE, "WORK_FOLDER", str(tmp_path / "build"))
    tarfile.open(tmp_path / "sent.tar", "w").close()

    def act(**changes: Any) -> dict[str, Any]:
        given = {"host": "gpu-01", "source": "build", "name": "kit:local", "inputs": "x", "variant": "cpu",
                 "base_images": {"cpu": "ubuntu:24.04"}, "sent": str(tmp_path / "sent.tar"),
                 "torch_index_urls": {"cpu": "https://torch/cpu", "cu130": "https://torch/cu130"}}  # fmt: skip
        found: dict[str, Any] = call_module(MODULE, tmp_path / "records", **{**given, **changes})
        return found

    return act


def test_the_image_names_its_base_with_digest_and_its_bill_of_materials(engine: Engine, build: Build) -> None:
    assert build()["changed"]
    labels = engine.images["kit:local"]["Config"]["Labels"]
    assert labels["org.mixtral-run.base"] == f"ubuntu:24.04@{DIGEST}"
    assert labels["org.mixtral-run.sbom"] == "/opt/mixtral-run/sbom.cdx.json"
    assert labels["org.mixtral-run.sbom.sha256"] == BILL
    assert len(labels["org.mixtral-run.inputs"]) == 64
    assert not build()["changed"]


def test_a_build_that_ends_before_its_labels_is_repeated(engine: Engine, build: Build) -> None:
    real = engine.run
    MODULE.run = lambda argv, **_: Result(1, "", "killed") if argv[1] == "run" else real(argv)
    assert "killed" in build()["msg"]
    MODULE.run = real
    assert build()["changed"]


def test_a_base_image_that_comes_from_no_registry_is_named_by_its_id(engine: Engine, build: Build) -> None:
    engine.images["ubuntu:24.04"] = {"Id": "sha256:10ca1", "RepoDigests": []}
    build()
    assert engine.images["kit:local"]["Config"]["Labels"]["org.mixtral-run.base"] == "ubuntu:24.04@sha256:10ca1"


def test_a_tag_that_moved_between_two_builds_is_reported(engine: Engine, build: Build, warnings: list[str]) -> None:
    build()
    assert warnings == []
    engine.images["ubuntu:24.04"] = {"Id": "sha256:2d", "RepoDigests": [f"ubuntu@{MOVED}"]}
    build(inputs="y")
    (warning,) = warnings
    assert f"ubuntu:24.04@{DIGEST}, then ubuntu:24.04@{MOVED}" in warning and "image_base_digests" in warning


def test_with_a_digest_that_image_is_the_base_or_none(engine: Engine, build: Build) -> None:
    message = build(base_digests={"cpu": MOVED, "cu130": DIGEST})["msg"]
    assert "ubuntu:24.04@" + MOVED in message and "correct image_base_images, image_base_digests" in message
    engine.registry[f"ubuntu:24.04@{DIGEST}"] = engine.registry["ubuntu:24.04"]
    assert build(base_digests={"cpu": DIGEST})["changed"]
    assert engine.arguments()["BASE_IMAGE"] == f"ubuntu:24.04@{DIGEST}"
    # The lock counts for a variant without an entry, and for the image that it names alone.
    engine.registry[f"ubuntu:24.04@{MOVED}"] = engine.registry["ubuntu:24.04"]
    engine.calls.clear()
    assert build(base_lock={"ubuntu:24.04": MOVED})["changed"]
    assert engine.arguments()["BASE_IMAGE"] == f"ubuntu:24.04@{MOVED}"
    for digests, lock, base in (
        ({"cpu": DIGEST}, {"ubuntu:24.04": MOVED}, f"ubuntu:24.04@{DIGEST}"),
        ({"cpu": ""}, {"ubuntu:24.04": MOVED}, "ubuntu:24.04"),
        ({}, {"ubuntu:22.04": MOVED}, "ubuntu:24.04"),
    ):
        engine.calls.clear()
        build(base_digests=digests, base_lock=lock, inputs=f"{digests} {lock}")
        assert engine.arguments()["BASE_IMAGE"] == base
    message = build(base_digests={"cpu": DIGEST[:-1]})["msg"]
    assert "image_base_digests has no digest for cpu" in message and "imagetools inspect ubuntu:24.04" in message


def test_a_base_image_from_a_file_that_the_lock_names_by_digest_has_its_own_next_step(
    engine: Engine, build: Build
) -> None:
    engine.pull_error = "dial tcp: lookup nvcr.io: no such host"
    lock = {"base_lock": {"ubuntu:24.04": DIGEST}}
    message = build(**lock)["msg"]
    assert "no such host" in message and "the host has" not in message and "image_base_digests" not in message
    engine.images["ubuntu:24.04"] = {"Id": "sha256:10ca1", "RepoDigests": []}
    message = build(**lock)["msg"]
    assert f"ubuntu:24.04@{DIGEST}" in message and "no such host" in message
    assert "the host has ubuntu:24.04@sha256:10ca1, which is another image or was loaded from a file" in message
    assert 'image_base_digests: {cpu: ""} builds from it' in message
    message = build(base_image=f"ubuntu:24.04@{DIGEST}")["msg"]
    assert "image_base_image: ubuntu:24.04 builds from it" in message and "image_base_digests" not in message
    engine.calls.clear()
    assert build(**lock, base_digests={"cpu": ""})["changed"]
    assert engine.arguments()["BASE_IMAGE"] == "ubuntu:24.04"
    # Where the tag decides there is nothing else to take.
    del engine.images["ubuntu:24.04"], engine.registry["ubuntu:24.04"]
    assert "the host has" not in build(inputs="y")["msg"]


@pytest.mark.parametrize(
    ("variant", "locks", "expected", "warned"),
    [
        ("cu130", {"common": False, "cu130": False}, ("common cu130", "1", ""), False),
        ("cpu", {"common": False, "cpu": True}, ("common cpu", "1", "https://torch/cpu"), False),
        ("cpu", {"common": False, "cu130": False}, ("common", "", "https://torch/cpu"), True),
        ("cpu", {}, ("", "", "https://torch/cpu"), False),
    ],
)
def test_packages_come_by_the_locks_of_the_variant(
    engine: Engine,
    build: Build,
    warnings: list[str],
    variant: str,
    locks: dict[str, bool],
    expected: tuple[str, str, str],
    warned: bool,
) -> None:
    build(variant=variant, base_images={variant: "ubuntu:24.04"}, locks=locks)
    given = engine.arguments()
    assert (given["LOCKS"], given["LOCKS_ARE_ALL"], given["TORCH_INDEX_URL"]) == expected
    assert [("torch for cpu" in text and "make lock" in text) for text in warnings] == [True] * warned


def test_the_context_has_the_locks_unless_the_packages_are_somebody_elses() -> None:
    action = load_action("kit_image")
    local = {"files_folder": str(ROOT / "roles/image/files"), "kit_folder": str(ROOT / "mixtral_run"), "ca_bundle": ""}
    given = {"wheelhouse": "", "wheelhouse_on_host": False}
    context = action._context({**local, "requirements": [], "require_hashes": True}, given)
    assert action._locks(context) == {"common": False, "cu130": False}
    assert "sbom.py" in context
    for changes in ({"requirements": ["torch==2.13"], "require_hashes": True},
                    {"requirements": [], "require_hashes": False}):  # fmt: skip
        context = action._context({**local, **changes}, given)
        assert action._locks(context) == {} and "locks/README.txt" in context
    text = b"# lock\ntorch==2.13.0+cu126 \\\n    --hash=sha256:0\n"
    assert action._locks({"locks/cu126.txt": text, "locks/README.txt": b""}) == {"cu126": True}


def test_the_build_that_installs_all_packages_has_the_inputs_of_a_build_by_the_role(
    engine: Engine, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image below the kit of test hosts is the one that is built from all wheels; a role's build starts from it."""
    seen: dict[str, bytes] = {}
    given: dict[str, str] = {}

    def call(*argv: object, **_: object) -> str:
        if argv[1] == "build":
            folder = Path(str(argv[-1]))
            seen.update(
                {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}
            )
            given.update(str(word).split("=", 1) for place, word in enumerate(argv) if argv[place - 1] == "--build-arg")
        return ""

    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/kit.whl").touch()
    for name, value in (("call", call), ("host_image", str), ("fill_wheelhouse", lambda: tmp_path / "wheels")):
        monkeypatch.setattr(kit_image, name, value)
    kit_image._build_dependencies("below", kit_image._halves_of_dockerfile()[0])
    action = load_action("kit_image")
    local = {"files_folder": str(ROOT / "roles/image/files"), "kit_folder": str(ROOT / "mixtral_run"), "ca_bundle": ""}
    wheels = {"wheelhouse": str(tmp_path / "wheels"), "wheelhouse_on_host": False}
    context = action._context({**local, "requirements": [], "require_hashes": True}, wheels)
    build(locks=action._locks(context))
    assert given["LOCKS"] == engine.arguments()["LOCKS"] == "common"
    assert seen["locks/common.txt"] == context["locks/common.txt"]
    assert seen["requirements.txt"] == context["requirements.txt"].partition(b"\n")[2]  # all but its comment
    assert seen["wheelhouse/kit.whl"] == b"" and context["wheelhouse/kit.whl"] == tmp_path / "wheels/kit.whl"
    assert context["Dockerfile"].startswith(seen["Dockerfile"]) and b"pip install" in seen["Dockerfile"]


def test_an_archive_is_loaded_if_it_is_the_file_that_the_digest_names(
    engine: Engine, tmp_path: Path, warnings: list[str]
) -> None:
    archive = tmp_path / "kit.tar"
    archive.write_bytes(b"docker save")
    given = {"host": "gpu-01", "source": "archive", "name": "kit:local", "archive_name": "kit:archive", "inputs": "x",
             "archive": str(archive), "archive_on_host": True}  # fmt: skip
    digest = "sha256:" + hashlib.sha256(b"docker save").hexdigest()
    refused = call_module(MODULE, tmp_path / "records", **given, archive_digest=MOVED)["msg"]
    assert "nothing was loaded" in refused and MOVED in refused and digest in refused
    assert not any(argv[1] == "load" for argv in engine.calls)
    assert "no digest" in call_module(MODULE, tmp_path / "records", **given, archive_digest=digest[7:])["msg"]
    assert call_module(MODULE, tmp_path / "records", **given, archive_digest=digest)["changed"]
    assert not call_module(MODULE, tmp_path / "records", **given, archive_digest=digest)["changed"]
    # Another digest is checked although the archive has not changed.
    assert "nothing was loaded" in call_module(MODULE, tmp_path / "records", **given, archive_digest=MOVED)["msg"]


def test_a_package_with_another_hash_has_its_own_next_step() -> None:
    text = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    assert "image_require_hashes" in MODULE.image_inputs.remedy(Result(1, "", text))
    text = "E: Version '4:13' for 'gcc' was not found\n"
    assert "image_apt_packages" in MODULE.image_inputs.remedy(Result(100, text, ""))


def test_small_parts_of_a_build(tmp_path: Path) -> None:
    other = "sha256:" + "b" * 64
    for none in (None, []):
        assert image_inputs.with_digest("base:1", {"RepoDigests": none, "Id": other}) == f"base:1@{other}"
    assert image_inputs.hash_of({"b": 1, "a": 2}) == image_inputs.hash_of({"a": 2, "b": 1})
    assert image_inputs.hash_of({"b": 1}) != image_inputs.hash_of({"b": 2})
    # SHA-256 of "abc", by FIPS 180.
    (tmp_path / "abc").write_bytes(b"abc")
    known = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert image_inputs.digest_of(tmp_path / "abc") == known
    assert image_inputs.listed([str(tmp_path / "abc")]) == ["abc 3"]
    assert image_inputs.proxy_variables("", "x") == {}
    assert image_inputs.proxy_variables("p", "x") == {
        "HTTP_PROXY": "p", "HTTPS_PROXY": "p", "NO_PROXY": "x", "http_proxy": "p", "https_proxy": "p", "no_proxy": "x",
    }  # fmt: skip
    assert image_inputs.build_args({"B": 2, "A": "1"}) == ["--build-arg", "A=1", "--build-arg", "B=2"]
    argv = image_inputs.label_build("kit:1", {"b": "2", "a": "1"}, str(tmp_path / "new"))
    assert argv == ["docker", "build", "--tag", "kit:1", "--label", "a=1", "--label", "b=2", str(tmp_path / "new")]
    assert (tmp_path / "new/Dockerfile").read_text() == "FROM kit:1\n"


def test_files_are_linked_or_copied_where_no_link_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    for folder in ("same", "other"):
        (tmp_path / folder).mkdir()
    image_inputs.place([str(tmp_path / "abc")], str(tmp_path / "same"))
    assert (tmp_path / "same/abc").samefile(tmp_path / "abc")

    def refuse(*_: object) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(image_inputs.os, "link", refuse)
    image_inputs.place([str(tmp_path / "abc")], str(tmp_path / "other"))
    assert not (tmp_path / "other/abc").samefile(tmp_path / "abc")
    assert (tmp_path / "other/abc").read_bytes() == b"abc"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("team/base:1", 0),
        ("localhost:5000/team/base:1", 1),
        ("localhost:5000/team/base", 1),
        ("localhost:5000/team/base:1@" + "sha256:" + "0" * 64, 1),
        ("localhost:5000/team/base:1@" + "sha256:" + "3" * 64, 3),
        ("ubuntu:24.04", 2),
        ("docker.io/library/ubuntu:24.04", 2),
        ("index.docker.io/library/ubuntu", 2),
        ("library/ubuntu:24.04", 2),
        ("docker.io/team/base:1", 0),
        ("quay.io/library/ubuntu:24.04", None),
        ("base:1", None),
        ("localhost:5000/team/base-2:1", None),
    ],
)
def test_the_digest_of_a_name_is_that_of_its_own_repository(name: str, place: int | None) -> None:
    repositories = ("team/base", "localhost:5000/team/base", "ubuntu", "localhost:5000/team/base")
    digests = ["sha256:" + str(number) * 64 for number in range(4)]
    image = {"Id": MOVED, "RepoDigests": [f"{a}@{b}" for a, b in zip(repositories, digests, strict=True)]}
    expected = MOVED if place is None else digests[place]
    assert image_inputs.with_digest(name, image) == f"{name.partition('@')[0]}@{expected}"


@pytest.mark.parametrize(
    ("driver", "variant"),
    [("580", "cu130"), ("580.65.06", "cu130"), ("579.9", "cu126"), ("525.60.13", "cu126"), ("524.99", None)],
)
def test_the_build_of_torch_for_a_driver(driver: str, variant: str | None) -> None:
    assert image_inputs.variant_for(driver) == variant
