"""What an image is made from: names with digests, hashes of archives, and the next step where an input is missing."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil

from .. import probe, shortfalls, space
from ..commands import last_lines

BLOCK = 1 << 20
DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
VARIANTS = (("cu130", "580"), ("cu126", "525"))
"""CUDA builds of torch, and the oldest driver that each runs on."""
SPACE_REMEDY = "`docker system df` and `docker image prune` on the host, or a larger disk: docker_data_root, docker_containerd_root"
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


def repository(name):
    """Return the repository of an image's name as the engine lists it: docker.io/library/ubuntu:24.04 gives ubuntu."""
    folders, slash, last = name.partition("@")[0].rpartition("/")
    found = folders + slash + last.partition(":")[0]
    for hub in ("index.docker.io/", "docker.io/", "library/"):
        found = found[len(hub) :] if found.startswith(hub) else found
    return found


def with_digest(name, image):
    """Return the name of an image with its digest. image: its entry of `docker image inspect`.

    An image can have digests of several repositories, and several of one: that of the name counts, or else the first
    of its repository. An image that comes from no registry has an ID only, which its content determines too.
    """
    name, _, asked = name.partition("@")
    pairs = [each.partition("@") for each in image.get("RepoDigests") or []]
    digests = [digest for known, _, digest in pairs if repository(known) == repository(name)]
    return "{}@{}".format(name, asked if asked in digests else next(iter(digests), image["Id"]))


def base_remedy(answer, name, local, variant):
    """Return the next step after a pull of the base image that failed.

    An image that was loaded from a file has another digest than the registry's, or none.
    name: NAME:TAG, without the digest. local: the answer of `docker image inspect` to it. variant: None if
    image_base_image names the digest, not image_base_digests or the lock.
    """
    if local.code:
        return remedy(answer)
    setting = 'image_base_digests: {{{}: ""}}'.format(variant) if variant else "image_base_image: " + name
    return "the host has {}, which is another image or was loaded from a file: {} builds from it. Otherwise: {}".format(
        with_digest(name, json.loads(local.out)[0]), setting, remedy(answer)
    )


def hash_of(values):
    """Return the hash of values of JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def place(paths, folder):
    """Have each file in a folder: by a link, or by a copy where the folder is on another file system."""
    for path in paths:
        target = os.path.join(folder, os.path.basename(path))
        try:
            os.link(path, target)
        except OSError:
            shutil.copyfile(path, target)


def digest_of(path):
    """Return the digest of a file: sha256: and 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK), b""):
            digest.update(block)
    return "sha256:" + digest.hexdigest()


def proxy_variables(proxy, no_proxy):
    """Return the variables of a proxy, in both spellings: apt and curl read http_proxy in lower case only."""
    found = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": no_proxy} if proxy else {}
    return dict(found, **{name.lower(): value for name, value in found.items()})


def build_args(values):
    """Return the arguments of `docker build` for variables of a Dockerfile."""
    return [word for name, value in sorted(values.items()) for word in ("--build-arg", "{}={}".format(name, value))]


def variant_for(driver):
    """Return the CUDA build of torch for a driver, or None if there is none."""
    fitting = (name for name, least in VARIANTS if shortfalls.version(driver) >= shortfalls.version(least))
    return next(fitting, None)


def full_disk(answer):
    """Return what is free where the engine stores images if an answer of it says that nothing is, else None."""
    if "no space left on device" not in (answer.out + answer.err).lower():
        return None
    engine = probe.engine()
    root = space.CONTAINERD_ROOT if engine["containerd_images"] else engine["root"] or space.DATA_ROOT
    return "{:g} GiB free under {}; {}".format(probe.disk(root)["free_gib"], root, last_lines(answer, 2))


def listed(paths):
    """Return name and size of each file."""
    return ["{} {}".format(os.path.basename(path), os.path.getsize(path)) for path in paths]


def label_build(name, labels, folder):
    """Write a Dockerfile into a new folder and return the arguments of the build that adds labels to an image."""
    os.makedirs(folder)
    with open(os.path.join(folder, "Dockerfile"), "w", encoding="utf-8") as file:
        file.write("FROM {}\n".format(name))
    words = [word for label, value in sorted(labels.items()) for word in ("--label", "{}={}".format(label, value))]
    return ["docker", "build", "--tag", name] + words + [folder]
