"""The archive of an image that passes from host to host: saved by ID, verified before it is loaded."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import json
import os
import shutil
import time
import uuid

from ..commands import last_lines, run
from ..files import RECORD_FOLDER, read_text, remove, write_text
from .blobs import Blobs, CopyError, RemoteFile, digest_of
from .plan import ME

FOLDER = os.path.join(RECORD_FOLDER, "spread")
SAVE_SECONDS = 3600
_PARTIAL = "saved-"
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

        The caller holds the lock. gid: group that may read the archive, because the login user serves it.
        """
        os.makedirs(self.blobs_folder, mode=0o755, exist_ok=True)
        for left in glob.glob(os.path.join(self.blobs_folder, _PARTIAL + "*")):  # of a killed run
            remove(left)
        known = self.known(image)
        if known is not None:
            return known
        self.needed_bytes(image)
        partial = os.path.join(self.blobs_folder, _PARTIAL + uuid.uuid4().hex)
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
            remove(partial)
        return self.remember(image, digest)

    def needed_bytes(self, image):
        """Return the space that the archive of an image will take. Raise CopyError without the image or the space."""
        size = image_bytes(image)
        if size is None:
            raise CopyError("its engine does not have the image {}".format(image), "look at that host")
        need_space(self.folder, size)
        return size

    def known(self, image):
        """Return the archive of an image, or None."""
        digest = self._images().get(image)
        path = self.blobs.blob(digest) if digest else None
        return RemoteFile(image, os.path.getsize(path), digest) if path and os.path.isfile(path) else None

    def remember(self, image, digest):
        """Note which image an archive holds. Return it as a RemoteFile."""
        write_text(self._index, json.dumps(dict(self._images(), **{image: digest})) + "\n", mode=0o600)
        return RemoteFile(image, os.path.getsize(self.blobs.blob(digest)), digest)

    def exists(self):
        """Return True if there are archives, or parts of some."""
        return os.path.isdir(self.folder)

    def remove(self, unless=None):
        """Remove all archives, also parts of some, unless `unless()` is true or another process is about to serve one.

        Without `unless`, wait for that process. Return True if there were any.
        """
        if not self.exists():
            return False
        with self.locked(wait=unless is None) as mine:
            if not mine or not self.exists() or (unless and unless()):
                return False
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # it holds records, or models
                os.rmdir(os.path.dirname(self.folder))
            return True

    def _images(self):
        try:
            return json.loads(read_text(self._index, "{}"))
        except ValueError:
            return {}

    @contextlib.contextmanager
    def locked(self, wait=True):
        """Hold the lock on the archives, which is on the folder around theirs. Yield False if it is held and not waited for.

        Who serves an archive holds it from the look for the archive until the key exists, so that nobody removes it.
        """
        around = os.path.dirname(self.folder)
        os.makedirs(around, mode=0o755, exist_ok=True)
        lock = os.open(around, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(lock)


def image_bytes(image):
    """Return the size of an image of this host in bytes; 0 if the engine does not tell it, None without the image."""
    answer = run(["docker", "image", "inspect", "--format", "{{.Size}}", image], timeout=30)
    if answer.code:
        return None
    return int(answer.out) if answer.out.strip().isdigit() else 0


def need_space(folder, num_bytes):
    """Raise CopyError unless the disk of a folder, which may be missing yet, has space for so many bytes."""
    there = folder
    while not os.path.isdir(there):
        there = os.path.dirname(there)
    figures = os.statvfs(there)
    free = figures.f_bavail * figures.f_frsize / 2**30
    if num_bytes and free < num_bytes / 2**30 + SPARE_GIB:
        raise CopyError(
            "{:.1f} GiB free under {}; the archive of the image takes {:.1f} GiB".format(
                free, folder, num_bytes / 2**30
            ),
            "free some space there, or set image_spread: false",
            ME,
        )


def image_report(source, identity, image):
    """Return `spread` for the plan of the next round. source: of the image; image: ID, or None if the host lacks it."""
    return {
        "identity": identity,
        "looked": time.time(),
        "holds": image is not None,
        "content": {"id": image, "inputs": identity, "source": source},
    }
