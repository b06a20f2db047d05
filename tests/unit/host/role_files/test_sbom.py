"""The bill of materials of the image follows CycloneDX's schema and lists what is installed."""

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
from types import ModuleType

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.utils import canonicalize_name

from tests.unit.host.conftest import ROOT

DPKG = (
    "libc6:amd64\t2.39-0ubuntu8.6\tamd64\tinstalled\n"
    "libc6:i386\t2.39-0ubuntu8.6\ti386\tinstalled\n"
    "gcc\t4:13.2.0-7ubuntu1\tamd64\tinstalled\n"
    "old\t1\tall\tconfig-files\n"
)
RELEASE = {"ID": "ubuntu", "VERSION_ID": "24.04"}


@pytest.fixture
def sbom(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "roles/image/files/sbom.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "KIT", ROOT)
    monkeypatch.setattr(module, "dpkg_output", lambda: DPKG)
    monkeypatch.setattr(module.platform, "freedesktop_os_release", lambda: RELEASE)
    return module


def test_it_follows_the_schema_of_cyclonedx(sbom: ModuleType) -> None:
    text = json.dumps(sbom.bill())
    validator = JsonStrictValidator(SchemaVersion.V1_6)
    assert validator.validate_str(text) is None
    assert validator.validate_str(text.replace('"library"', '"book"', 1)) is not None


def test_it_lists_what_is_installed(sbom: ModuleType) -> None:
    bill = sbom.bill()
    purls = {each["purl"] for each in bill["components"] if each["type"] == "library"}
    assert {purl for purl in purls if purl.startswith("pkg:deb/")} == {
        "pkg:deb/ubuntu/libc6@2.39-0ubuntu8.6?arch=amd64&distro=ubuntu-24.04",
        "pkg:deb/ubuntu/libc6@2.39-0ubuntu8.6?arch=i386&distro=ubuntu-24.04",
        "pkg:deb/ubuntu/gcc@4%3A13.2.0-7ubuntu1?arch=amd64&distro=ubuntu-24.04",
    }
    installed = {canonicalize_name(each.metadata["Name"]) for each in importlib.metadata.distributions()}
    assert {purl.split("@")[0].removeprefix("pkg:pypi/") for purl in purls if ":pypi/" in purl} == installed
    assert f"pkg:pypi/click@{importlib.metadata.version('click')}" in purls
    assert [each["name"] for each in bill["components"] if each["type"] == "operating-system"] == ["ubuntu"]
    assert bill["metadata"]["component"]["version"] == importlib.metadata.version("mixtral-run")


def test_equal_content_has_equal_bytes_and_another_content_another_number(sbom: ModuleType) -> None:
    first, second = sbom.bill(), sbom.bill()
    assert first == second
    other = sbom.document(first["components"][1:], "0.2.0")
    assert other["serialNumber"] != first["serialNumber"]


def test_dpkg_prints_what_is_parsed(sbom: ModuleType) -> None:
    if not shutil.which("dpkg-query"):
        pytest.skip("no Debian packages here")
    text = subprocess.run(
        ["dpkg-query", "-W", "-f", sbom.DPKG_FORMAT], capture_output=True, text=True, check=True
    ).stdout
    found = {each["name"]: each["version"] for each in sbom.debian_packages(text, RELEASE)}
    wanted = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "dpkg"], capture_output=True, text=True, check=True
    )
    assert found["dpkg"] == wanted.stdout and len(found) > 50
