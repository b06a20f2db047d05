"""Digests of the image's base images, asked of their registries: the part of `make lock` that needs no pip index.

The digest of a manifest is the SHA-256 of its bytes, so that no answer has to be believed.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

LOCK_NAME = "base-images.json"
TIMEOUT_SECONDS = 60
MOST_BYTES = 4 * 2**20
"""The largest manifest that registries take."""
KINDS = (
    "application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.list.v2+json, "
    "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json"
)
"""An index of all platforms where there is one, as the engine asks: its digest is the one that `docker pull` takes."""
HUB = {"docker.io": "registry-1.docker.io"}


class RegistryError(Exception):
    """A registry did not answer as it should; the message says what it did."""


def write_lock(folder: Path, images: Mapping[str, str], registries: Mapping[str, str]) -> bool:
    """Write the digests of base images to FOLDER/base-images.json, and return True if all registries answered.

    Args:
        folder: of the image's locks.
        images: variant → NAME:TAG.
        registries: host in a name → URL of a mirror that is asked instead.

    The digest of an image whose registry does not answer stays as it is. Images that no variant has go.
    """
    path, complete = folder / LOCK_NAME, True
    before: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, str] = {}
    for image in sorted(set(images.values())):
        try:
            found[image] = digest_of(image, registries)
        except RegistryError as error:
            complete = False
            found |= {image: before[image]} if image in before else {}
            host = image.split("/")[0]
            print(f"✗ the digest of {image} is not written: {error}\n  next: make lock where {host} can be reached, or "
                  f"LOCK_ARGS='--registry {host}=MIRROR'", file=sys.stderr)  # fmt: skip
    path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(found)} base images")
    return complete


def digest_of(image: str, registries: Mapping[str, str]) -> str:
    """Return the digest of NAME:TAG. Raises RegistryError."""
    host, _, rest = image.partition("/")
    name, _, tag = rest.rpartition(":")
    root = registries.get(host, f"https://{HUB.get(host, host)}").rstrip("/")
    url = f"{root}/v2/{name}/manifests/{tag}"
    try:
        body, claimed = _manifest(url, None)
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise RegistryError(f"{url} answers {error.code} {error.reason}") from error
        challenge = error.headers.get("WWW-Authenticate", "")
        try:
            body, claimed = _manifest(url, _token(challenge, root))
        except (OSError, ValueError, KeyError) as second:
            raise RegistryError(f"{url}: {second}") from second
    except OSError as error:
        raise RegistryError(f"{url}: {error}") from error
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if claimed and claimed != digest:
        raise RegistryError(f"{url} names the digest {claimed[:80]!a}, but sent {digest}")
    return digest


def _manifest(url: str, token: str | None) -> tuple[bytes, str]:
    headers = {"Accept": KINDS, **({"Authorization": f"Bearer {token}"} if token else {})}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener().open(request, timeout=TIMEOUT_SECONDS) as answer:
        body = answer.read(MOST_BYTES + 1)
        if len(body) > MOST_BYTES:
            raise OSError(f"a manifest of more than {MOST_BYTES:,} bytes")
        return body, answer.headers.get("Docker-Content-Digest", "")


def _token(challenge: str, root: str) -> str:
    """Return the token that anybody gets for reading, as the registry's answer 401 says where."""
    if not challenge.lower().startswith("bearer "):
        raise ValueError("the registry wants a password, and a lock is made without one")
    words = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    realm = words["realm"]
    if not realm.startswith("https://") and not root.startswith("http://"):
        raise ValueError(f"the registry wants a token from {realm[:80]!a}, which is not https")
    asked = urllib.parse.urlencode({key: words[key] for key in ("service", "scope") if key in words})
    with urllib.request.build_opener().open(f"{realm}?{asked}", timeout=TIMEOUT_SECONDS) as answer:
        values = json.loads(answer.read(MOST_BYTES))
    return str(values.get("token") or values["access_token"])
