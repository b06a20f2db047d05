"""The image's names on a host: those that the kit brought in go with it, those that were there stay."""

import importlib.util
import json
import shutil
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from ansible.module_utils.mixtral_run_host.commands import Result
from ansible.module_utils.mixtral_run_host.spread.archive import ImageArchive

from tests.unit.host.conftest import ROOT, call_module, load_module

MODULE = load_module("kit_image")


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """STAND-IN for the engine: names and what each means; an archive holds v1 under the name kit:archive."""
    found: dict[str, str] = {}

    def run(argv: list[str], **_: object) -> Result:
        verb = " ".join(argv[1:3]) if argv[1] == "image" else argv[1]
        if verb == "image inspect" and argv[-1] in found:
            return Result(0, json.dumps([{"Id": found[argv[-1]]}]), "")
        if verb == "load":
            found["kit:archive"] = "v1"
        elif verb == "tag":
            found[argv[3]] = found[argv[2]]
        elif verb == "image rm":
            found.pop(argv[3])
        return Result(int(verb == "image inspect"), "", "")

    monkeypatch.setattr(MODULE, "run", run)
    return found


@pytest.mark.parametrize("before", [{}, {"kit:archive": "v0"}])
def test_a_name_that_came_with_the_archive_goes_with_it(
    names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: dict[str, str]
) -> None:
    monkeypatch.setattr(MODULE, "WORK_FOLDER", str(tmp_path / "build"))
    names.update(before)
    given = {
        "host": "gpu-01",
        "source": "archive",
        "name": "kit:local",
        "archive_name": "kit:archive",
        "sent": "/a.tar",
    }
    for inputs in ("first", "second"):
        call_module(MODULE, tmp_path / "records", **given, inputs=inputs)
    assert set(names) == {"kit:local", "kit:archive"}
    assert call_module(MODULE, tmp_path / "records", **given, inputs="", state="absent")["removed"] == ["kit:local"]
    assert set(names) == set(before)


def test_an_archive_that_served_other_hosts_is_reported(
    names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "ImageArchive", lambda: ImageArchive(str(tmp_path / "spread")))
    names["kit:local"] = "v1"
    given = {"host": "gpu-01", "source": "registry", "name": "kit:local", "inputs": "", "look": True}
    given["registry_reference"] = "kit@sha256:" + "0" * 64
    monkeypatch.setattr(MODULE, "forget_copies", lambda *_: False)
    assert call_module(MODULE, tmp_path / "records", **given)["archive_left"] is False
    (tmp_path / "spread").mkdir()
    assert call_module(MODULE, tmp_path / "records", **given)["archive_left"] is True


@pytest.fixture
def action() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kit_action", ROOT / "plugins/action/kit_image.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_image_gets_all_of_the_kit_and_nothing_else(tmp_path: Path, action: ModuleType) -> None:
    kit = tmp_path / "mixtral_run"
    shutil.copytree(ROOT / "mixtral_run", kit)
    for name in ("provisioning/roles/docker/tasks/main.yml", "__pycache__/x.pyc", "model/__pycache__/y.pyc"):
        (kit / name).parent.mkdir(parents=True, exist_ok=True)
        (kit / name).touch()
    local = {
        "files_folder": str(ROOT / "roles/image/files"),
        "kit_folder": str(kit),
        "ca_bundle": "",
        "require_hashes": True,
    }
    context = action._context(local | {"requirements": []}, {"wheelhouse": "", "wheelhouse_on_host": False})
    sent = {name for name in context if name.startswith("mixtral_run/")}
    assert {"mixtral_run/model/kernels/csrc/product.cu", "mixtral_run/trial/instructions.jsonl"} < sent
    own = {str(path.relative_to(ROOT)) for path in (ROOT / "mixtral_run").rglob("*") if path.is_file()}
    assert sent == {name for name in own if "__pycache__" not in name}


def test_index_and_certificates_reach_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: ModuleType
) -> None:
    (tmp_path / "own.crt").write_text("certificates of our own")
    local = {"files_folder": str(ROOT / "roles/image/files"), "kit_folder": str(ROOT / "mixtral_run")}
    local["require_hashes"] = True
    local |= {"ca_bundle": str(tmp_path / "own.crt"), "requirements": ["torch==2.9"]}
    context = action._context(local, {"wheelhouse": "", "wheelhouse_on_host": False})
    with (tmp_path / "sent.tar").open("wb") as file:
        action._write_tar(context, file)
    builds = []

    def run(argv: list[str], **_: object) -> Result:
        if argv[:2] == ["docker", "build"] and "--build-arg" in argv:
            names = ("ca/ca-bundle.crt", "requirements.txt")
            builds.append((argv, [(Path(argv[-1]) / name).read_text() for name in names]))
        there = argv[1] == "image" and (builds or argv[-1] != "kit:local")
        return Result(int(argv[1] == "image" and not there), '[{"Id": "v1"}]' if there else "", "")

    monkeypatch.setattr(MODULE, "run", run)
    monkeypatch.setattr(MODULE, "WORK_FOLDER", str(tmp_path / "build"))
    call_module(
        MODULE, tmp_path / "records", host="gpu-01", source="build", name="kit:local", inputs="x", variant="cu126",
        sent=str(tmp_path / "sent.tar"), pip_index_url="https://index/simple", pip_trusted_host="index",
        torch_index_urls={"cu126": "https://torch/cu126"}, base_images={"cu126": "base:12.6"},
    )  # fmt: skip
    ((argv, texts),) = builds
    assert texts == ["certificates of our own", "torch==2.9\n"]
    given = {argv[place + 1] for place, word in enumerate(argv) if word == "--build-arg"}
    assert given >= {
        "PIP_INDEX_URL=https://index/simple", "PIP_TRUSTED_HOST=index", "TORCH_INDEX_URL=https://torch/cu126",
        "BASE_IMAGE=base:12.6",
    }  # fmt: skip


def test_it_is_built_again_when_an_input_changed_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine: dict[str, str] = {}

    def run(argv: list[str], **_: object) -> Result:
        if argv[:2] == ["docker", "build"] and "--label" in argv:
            labels = dict(argv[place + 1].split("=", 1) for place, word in enumerate(argv) if word == "--label")
            engine["hash"] = labels[MODULE.LABEL]
        image = [{"Id": "v1", "Config": {"Labels": {MODULE.LABEL: engine.get("hash")}}}]
        return Result(int(argv[1] == "image" and argv[-1] == "kit:local" and not engine), json.dumps(image), "")

    monkeypatch.setattr(MODULE, "run", run)
    monkeypatch.setattr(MODULE, "WORK_FOLDER", str(tmp_path / "build"))
    tarfile.open(tmp_path / "sent.tar", "w").close()
    given = {"host": "gpu-01", "source": "build", "name": "kit:local", "inputs": "kit", "variant": "cpu",
             "sent": str(tmp_path / "sent.tar")}  # fmt: skip
    changes: list[dict] = [
        {"inputs": "kit, edited"}, {"base_image": "base:2"}, {"pip_index_url": "https://index"}, {"uid": 1001},
        {"torch_index_urls": {"cpu": "https://torch"}}, {"apt_packages": ["gcc=4:12.2"]},
        {"base_image": "", "base_images": {"cpu": "base:3"}}, {"base_digests": {"cpu": "sha256:" + 64 * "0"}},
        {"locks": {"common": False}},
    ]  # fmt: skip
    for change in [{}, *changes]:
        given |= change
        again = [call_module(MODULE, tmp_path / "records", **given)["changed"] for _ in range(2)]
        assert again == [True, False], change
    # A proxy is the way to the inputs, not one of them.
    assert not call_module(MODULE, tmp_path / "records", **given, proxy="http://p:3128")["changed"]


@pytest.mark.parametrize(("containerd", "root"), [(True, "/var/lib/containerd"), (False, "/data/docker")])
def test_a_full_disk_of_the_engine_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, containerd: bool, root: str
) -> None:
    def run(argv: list[str], **_: object) -> Result:
        if argv[1] == "load":
            return Result(1, "", "write /blobs/ingest: no space left on device\n")
        return Result(int(argv[1] == "image"), "", "")

    monkeypatch.setattr(MODULE, "run", run)
    monkeypatch.setattr(MODULE.probe, "engine", lambda: {"containerd_images": containerd, "root": "/data/docker"})
    monkeypatch.setattr(MODULE.probe, "disk", lambda path: {"free_gib": 0.1 if path == root else 9e9})
    given = {"host": "gpu-01", "source": "archive", "name": "kit:local", "archive_name": "kit:a", "sent": "/a.tar"}
    message = call_module(MODULE, tmp_path / "records", **given, inputs="1")["msg"]
    assert message.startswith("The engine has no space for the image.")
    assert f"0.1 GiB free under {root}" in message and "docker_data_root" in message and "again" not in message
