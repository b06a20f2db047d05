"""Write the software bill of materials of the image in which this runs, as CycloneDX 1.6 JSON: `sbom.py FILE`.

It lists what is installed: Python packages by importlib.metadata, Debian packages by dpkg-query, the distribution and
the kit. Only the standard library is used. Equal content gives equal bytes: there is no time in it, and the serial
number is derived from the content.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import uuid
from pathlib import Path
from urllib.parse import quote

DPKG_FORMAT = "${binary:Package}\\t${Version}\\t${Architecture}\\t${db:Status-Status}\\n"
NAMESPACE = uuid.UUID("7b0f3c1e-8c0e-4d5a-9a52-0d9e5a1f6c27")
KIT = Path(__file__).resolve().parent / "kit"


def main(file: str) -> None:
    Path(file).write_text(json.dumps(bill(), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def bill() -> dict:
    release = platform.freedesktop_os_release()
    components = [*python_packages(), *debian_packages(dpkg_output(), release)]
    system = {"type": "operating-system", "name": release["ID"], "version": release.get("VERSION_ID", "rolling")}
    return document([{**system, "bom-ref": f"os:{system['name']}@{system['version']}"}, *components], kit_version())


def document(components: list[dict], version: str) -> dict:
    components = sorted(components, key=lambda each: each["bom-ref"])
    content = json.dumps([version, components], sort_keys=True).encode()
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(NAMESPACE, hashlib.sha256(content).hexdigest())}",
        "metadata": {"component": {"type": "container", "bom-ref": "image", "name": "mixtral-run", "version": version}},
        "components": components,
    }


def python_packages() -> list[dict]:
    found = {}
    for each in importlib.metadata.distributions():
        # PEP 503: names of packages are compared like this.
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        if name and name not in found:  # what comes first on the path is imported
            found[name] = library(name, each.version, f"pkg:pypi/{quote(name)}@{quote(each.version, safe='')}")
            if expression := each.metadata.get("License-Expression"):
                found[name]["licenses"] = [{"expression": expression}]
    return list(found.values())


def debian_packages(text: str, release: dict[str, str]) -> list[dict]:
    found = []
    for line in text.splitlines():
        package, version, architecture, status = line.split("\t")
        if status != "installed":
            continue
        name = package.partition(":")[0]
        distribution = f"{release['ID']}-{release.get('VERSION_ID', 'rolling')}"
        purl = (
            f"pkg:deb/{release['ID']}/{quote(name)}@{quote(version, safe='')}?arch={architecture}&distro={distribution}"
        )
        found.append(library(name, version, purl))
    return found


def library(name: str, version: str, purl: str) -> dict:
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def dpkg_output() -> str:
    try:
        argv = ["dpkg-query", "--show", "--showformat", DPKG_FORMAT]
        return subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:  # a distribution without Debian's packages
        return ""


def kit_version() -> str:
    text = (KIT / "mixtral_run/__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    return found.group(1) if found else "unknown"


if __name__ == "__main__":
    main(sys.argv[1])
