"""One model in the HF cache. Files are copied with resumption, verified by size and hash, and published last.

Layout (huggingface_hub, file_download.py): models--ORG--NAME/{blobs/HASH, refs/REVISION, snapshots/COMMIT/FILE → blob}.
The blob of a large file is named by its SHA-256, that of a small file by its git hash, so a cache can verify itself.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections import namedtuple
from http.client import HTTPException, IncompleteRead

CHUNK = 1 << 20
RemoteFile = namedtuple("RemoteFile", "path size digest")


class ModelError(Exception):
    """Error that prevents a model from being put into the cache. `remedy` is the next step for the user."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.what, self.remedy = what, remedy


def checked_files(listed, source):
    """Return the files that another machine lists, as RemoteFile. Raise ModelError if a path would leave the cache.

    listed: the machine's answer, a list of [path, size, hash]. Root writes files by these values, so the machine is not
    trusted: a path must be relative, without `..` and control characters; a hash must be hexadecimal digits; a size
    must be a number of bytes; and no path may be a file and a folder at the same time.
    """
    if not isinstance(listed, list):
        raise ModelError("{}: the answer is no list of files".format(source), _UNTRUSTED)
    files = []
    for each in listed:
        path, size, digest = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
        if not (_is_relative(path) and isinstance(size, int) and size >= 0 and _is_digest(digest)):
            raise ModelError("{}: it lists {!a:.200}".format(source, each), _UNTRUSTED)
        files.append(RemoteFile(path, size, digest))
    folders = {path for file in files for path in _parents(file.path)}
    inside = sorted(folders & {file.path for file in files})
    if inside:
        raise ModelError("{}: it lists {!a} as a file and as a folder".format(source, inside[0]), _UNTRUSTED)
    return files


def checked_commit(value, source):
    """Return the commit that another machine names, which becomes a folder's name. Raise ModelError if it is no hash."""
    if not _is_digest(value):
        raise ModelError("{}: it names the commit {!a:.200}".format(source, value), _UNTRUSTED)
    return value


def matching(files, patterns):
    """Return the files whose path matches one of the patterns."""
    return [file for file in files if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)]


_UNTRUSTED = "nothing was written; this machine is not what it should be: check hf_cache_peer"


def _is_relative(path):
    if not isinstance(path, str) or len(path) > 1000:
        return False
    return re.match(r"[^\x00-\x1f\x7f\\]+\Z", path) is not None and not {"", ".", ".."} & set(path.split("/"))


def _is_digest(value):
    return isinstance(value, str) and re.match(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z", value) is not None


def _parents(path):
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _chunks(stream, what):
    """Yield the content of a stream in chunks. If it breaks off, yield the part that arrived, then raise ModelError."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, HTTPException) as error:
            if isinstance(error, IncompleteRead):
                yield error.partial
            raise ModelError(
                "{}: the connection broke off: {}".format(what, error), "run again: it goes on there"
            ) from error
        if not chunk:
            return
        yield chunk


def digest_of(path, like):
    """Return the hash of a file, of the same kind as `like`: SHA-256 for 64 digits, git's SHA-1 of a blob for 40."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


class ModelCache:
    """Folder of one model in an HF cache."""

    def __init__(self, home, model, uid=-1, gid=-1):
        self.folder = os.path.join(home, "hub", "models--" + model.replace("/", "--"))
        self._uid, self._gid = uid, gid

    def blob(self, digest):
        return os.path.join(self.folder, "blobs", digest)

    def has(self, file):
        """Return True if the blob exists with the right size. Its hash was verified before it got its name."""
        try:
            return os.path.getsize(self.blob(file.digest)) == file.size
        except OSError:
            return False

    def fetch(self, source, commit, file):
        """Fetch one file from another host; resume an interrupted copy. Raise ModelError for a wrong size or hash."""
        partial = self.blob(file.digest) + ".incomplete"
        os.makedirs(os.path.dirname(partial), exist_ok=True)
        start = os.path.getsize(partial) if os.path.exists(partial) else 0
        if start > file.size:
            os.unlink(partial)
            start = 0
        if start < file.size or not file.size:
            with source.open_file(commit, file, start) as (answer, resumes), open(partial, "ab") as out:
                if start and not resumes:
                    out.truncate(0)
                for chunk in _chunks(answer, file.path):
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
        self.settle(partial, file)

    def settle(self, partial, file):
        """Verify a file and rename it to its blob name. Raise ModelError if it is short, or remove it and raise if wrong."""
        size = os.path.getsize(partial)
        if size < file.size:
            raise ModelError(
                "{}: {} of {} bytes arrived".format(file.path, size, file.size), "run again: it goes on there"
            )
        found = digest_of(partial, file.digest)
        if size != file.size or found != file.digest:
            os.unlink(partial)
            raise ModelError(
                "{}: expected {} bytes with hash {}; found {} bytes with {}".format(
                    file.path, file.size, file.digest, size, found
                ),
                "run again: the file is fetched anew",
            )
        self._own(partial)
        os.rename(partial, self.blob(file.digest))

    def check(self, file):
        """Remove the file and raise ModelError if its content does not match the hash in its name."""
        found = digest_of(self.blob(file.digest), file.digest)
        if found != file.digest:
            os.unlink(self.blob(file.digest))
            raise ModelError(
                "{}: expected a file with hash {}; found {}".format(file.path, file.digest, found),
                "run again: the file is fetched anew",
            )

    def publish(self, revision, commit, files):
        """Publish the snapshot: create its links first and the revision's reference last. Return True on a change."""
        changed = False
        snapshot = os.path.join(self.folder, "snapshots", commit)
        for file in files:
            link = os.path.join(snapshot, file.path)
            target = os.path.relpath(self.blob(file.digest), os.path.dirname(link))
            if os.path.lexists(link) and os.readlink(link) == target:
                continue
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if os.path.lexists(link):
                os.unlink(link)
            os.symlink(target, link)
            changed = True
        reference = os.path.join(self.folder, "refs", revision)
        os.makedirs(os.path.dirname(reference), exist_ok=True)
        if not os.path.exists(reference) or open(reference).read() != commit:
            with open(reference + ".partial", "w") as file:
                file.write(commit)
            os.rename(reference + ".partial", reference)
            changed = True
        if changed:
            for parent, folders, names in os.walk(self.folder):
                for each in [parent] + [os.path.join(parent, name) for name in folders + names]:
                    self._own(each)
        return changed

    def _own(self, path):
        os.chown(path, self._uid, self._gid, follow_symlinks=False)
