"""What an image is made from: names with digests, hashes of archives, and the next step where an input is missing."""

from __future__ import annotations

import hashlib
import re

BLOCK = 1 << 20
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
REMEDIES = (
    ("toomanyrequests", "the registry limits pulls: log in on the host, or name a mirror in docker_registry_mirrors"),
    ("429", "the registry limits pulls: log in on the host, or name a mirror in docker_registry_mirrors"),
    (
        "DO NOT MATCH THE HASHES",
        "a package is another file than the lock names. Fill the wheelhouse by the locks (README of the role image), use "
        "another index, or set image_require_hashes: false if you trust this one",
    ),
    (
        "No matching distribution",
        "the wheelhouse or index lacks what the line above names, or has it for another Python",
    ),
    ("CERTIFICATE_VERIFY_FAILED", "a proxy signs for itself: give its certificates by image_ca_bundle"),
    ("SSLError", "a proxy signs for itself: give its certificates by image_ca_bundle"),
    (
        "' was not found",
        "the package source has another version than image_apt_packages names: change it, or the source of the base image",
    ),
    ("pull access denied", "the base image is not to be had: set image_base_image, or load it on the host first"),
    (
        "manifest unknown",
        "the registry has no image of this tag or digest: correct image_base_images, image_base_digests",
    ),
)


def remedy(answer):
    """Return the next step after a build or pull that failed."""
    text = answer.out + answer.err
    return next(
        (step for words, step in REMEDIES if words in text), "correct what the lines above name, then run again"
    )


def with_digest(name, image):
    """Return the name of an image with its digest. image: its entry of `docker image inspect`.

    An image that comes from no registry has an ID only, which its content determines too.
    """
    digests = [each.partition("@")[2] for each in image.get("RepoDigests") or []]
    return "{}@{}".format(name.partition("@")[0], digests[0] if digests else image["Id"])


def digest_of(path):
    """Return the digest of a file: sha256: and 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return "sha256:" + digest.hexdigest()
