"""The archive of an image that passes from host to host: saved by ID, verified before it is loaded."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tarfile
import time
import uuid

from ..commands import last_lines, run
from ..files import RECORD_FOLDER, read_text, write_text
from .blobs import Blobs, CopyError, RemoteFile, digest_of
from .plan import SHARED

FOLDER = os.path.join(RECORD_FOLDER, "spread")
SAVE_SECONDS = 3600
_MANIFEST_BYTES = 16 << 20
SPARE_GIB = 5


class ImageArchive:
    """Archives of images in FOLDER/blobs, named by their SHA-256. An index has the ID of the image in each."""

    def __init__(self, folder=None):
        self.folder = folder or FOLDER
        self.blobs_folder = os.path.join(self.folder, "blobs")
        self.blobs = Blobs(self.folder)
        self._index = os.path.join(self.folder, "index.json")

    def save(self, image, gid):
        """Write the archive of an image unless it exists. Return it as a RemoteFile. Raise CopyError on failure.

        Several hosts may ask for it at the same time. gid: group that may read it, because the login user serves it.
        """
        os.makedirs(self.blobs_folder, mode=0o755, exist_ok=True)
        with self._locked():
            known = self.known(image)
            if known is not None:
                return known
            need_space(self.folder, image_bytes(image))
            partial = os.path.join(self.blobs_folder, "saved-" + uuid.uuid4().hex)
            try:
                # Saved by its ID, the archive names no tag that a load would move.
                answer = run(["docker", "save", "--output", partial, image], timeout=SAVE_SECONDS)
                if answer.code:
                    raise CopyError("docker save: " + last_lines(answer, 3), "run again")
                digest = digest_of(partial, "0" * 64)
                os.chown(partial, -1, gid)
                os.chmod(partial, 0o640)
                os.rename(partial, self.blobs.blob(digest))
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(partial)
            return self.remember(image, digest)

    def known(self, image):
        """Return the archive of an image, or None."""
        digest = self._images().get(image)
        path = self.blobs.blob(digest) if digest else None
        return RemoteFile(image, os.path.getsize(path), digest) if path and os.path.isfile(path) else None

    def remember(self, image, digest):
        """Note which image an archive holds. Return it as a RemoteFile."""
        write_text(self._index, json.dumps(dict(self._images(), **{image: digest})) + "\n", mode=0o600)
        return RemoteFile(image, os.path.getsize(self.blobs.blob(digest)), digest)

    def remove(self):
        """Remove all archives, also parts of some. Return True if there were any."""
        found = os.path.isdir(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)
        return found

    def _images(self):
        try:
            return json.loads(read_text(self._index, "{}"))
        except ValueError:
            return {}

    @contextlib.contextmanager
    def _locked(self):
        lock = os.open(self.blobs_folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def ids_in(path):
    """Return the IDs that engines may give to the one image of an archive; they follow from its bytes.

    An engine that stores images itself takes the SHA-256 of the configuration, which has the hashes of all layers. An
    engine that stores them in containerd takes that of the manifest, which has the hash of the configuration. Raise
    CopyError for an archive with several images or with names: a load would give these names to what is in it.
    """
    try:
        with tarfile.open(path) as archive:
            members = {member.name: member for member in archive if member.isreg()}
            content = json.loads(_bytes_of(archive, members, "manifest.json"))
            if not isinstance(content, list) or len(content) != 1 or content[0].get("RepoTags"):
                raise CopyError("it holds several images, or names for one", _HOSTILE)
            ids = ["sha256:" + hashlib.sha256(_bytes_of(archive, members, content[0]["Config"])).hexdigest()]
            if "index.json" in members:
                listed = json.loads(_bytes_of(archive, members, "index.json"))["manifests"]
                if len(listed) != 1 or set(listed[0].get("annotations") or {}) & _NAMES:
                    raise CopyError("it holds several images, or names for one", _HOSTILE)
                name = "blobs/sha256/" + listed[0]["digest"].partition(":")[2]
                ids.append("sha256:" + hashlib.sha256(_bytes_of(archive, members, name)).hexdigest())
            return ids
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CopyError("it is no archive of one image: {!r:.200}".format(error), _HOSTILE) from error


_HOSTILE = "nothing was loaded; look at the host that it came from"
_NAMES = {"io.containerd.image.name", "org.opencontainers.image.ref.name"}


def _bytes_of(archive, members, name):
    if members[name].size > _MANIFEST_BYTES:
        raise ValueError("{} is too large".format(name))
    return archive.extractfile(members[name]).read()


def image_bytes(image):
    """Return the size of an image of this host in bytes; 0 if the engine does not tell it."""
    answer = run(["docker", "image", "inspect", "--format", "{{.Size}}", image], timeout=30)
    return int(answer.out) if answer.code == 0 and answer.out.strip().isdigit() else 0


def need_space(folder, num_bytes):
    """Raise CopyError unless the disk of a folder has space for so many bytes."""
    figures = os.statvfs(folder)
    free = figures.f_bavail * figures.f_frsize / 2**30
    if num_bytes and free < num_bytes / 2**30 + SPARE_GIB:
        raise CopyError(
            "{:.1f} GiB free under {}; the archive of the image takes {:.1f} GiB".format(
                free, folder, num_bytes / 2**30
            ),
            "free some space there, or set image_spread: false",
        )


def image_report(params, identity, image):
    """Return `spread` for the plan of the next round. params: of the module; image: ID, or None if the host lacks it."""
    return {
        "name": params["host"],
        "identity": identity,
        "looked": time.time(),
        "holds": image is not None,
        "origin": SHARED,
        "key": image or "",
        "content": {"id": image, "inputs": identity, "source": params["source"]},
        "address": params["address"],
        "port": params["port"],
        "user": params["user"],
        "folder": "",
    }
