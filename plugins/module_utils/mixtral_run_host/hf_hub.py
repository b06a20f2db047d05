"""A model of the Hugging Face hub in the cache's own layout: listed, fetched with resumption, verified by size and hash.

Layout (huggingface_hub, file_download.py): models--ORG--NAME/{blobs/HASH, refs/REVISION, snapshots/COMMIT/FILE → blob}.
A large file's blob is named by its SHA-256, a small one's by its git hash, so a cache can be verified by itself.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
from collections import namedtuple
from http.client import HTTPException, IncompleteRead
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

CHUNK = 1 << 20
RemoteFile = namedtuple("RemoteFile", "path size digest")


class HubError(Exception):
    """The hub, or what it sent, is not as it should be. `remedy` says what to do."""

    def __init__(self, what, remedy):
        super().__init__(what)
        self.what, self.remedy = what, remedy


def checked_files(listed, source):
    """Return the files that another machine lists, as RemoteFile. Raises HubError for names that would leave the cache.

    listed: what the machine answered, [path, size, hash] each. Root writes by these values, so that the machine is not
    trusted: paths are relative, without `..`, links and control characters; a hash is hexadecimal digits; a size is a
    count of bytes.
    """
    if not isinstance(listed, list):
        raise HubError("{}: the answer is no list of files".format(source), _UNTRUSTED)
    files = []
    for each in listed:
        path, size, digest = each if isinstance(each, list) and len(each) == 3 else (None, None, None)
        if not (_is_relative(path) and isinstance(size, int) and size >= 0 and _is_digest(digest)):
            raise HubError("{}: it lists {!a:.200}".format(source, each), _UNTRUSTED)
        files.append(RemoteFile(path, size, digest))
    folders = {path for file in files for path in _parents(file.path)}
    inside = sorted(folders & {file.path for file in files})
    if inside:
        raise HubError("{}: it lists {!a} as a file and as a folder".format(source, inside[0]), _UNTRUSTED)
    return files


def checked_commit(value, source):
    """Return a commit that another machine names; it becomes a folder's name. Raises HubError for anything but a hash."""
    if not _is_digest(value):
        raise HubError("{}: it names the commit {!a:.200}".format(source, value), _UNTRUSTED)
    return value


def matching(files, patterns):
    """Return the files whose path matches one of the patterns."""
    return [file for file in files if any(fnmatch.fnmatchcase(file.path, pattern) for pattern in patterns)]


_UNTRUSTED = "nothing was written; this machine is not what it should be: check hf_cache_endpoint or hf_cache_peer"


def _is_relative(path):
    if not isinstance(path, str) or len(path) > 1000:
        return False
    return re.match(r"[^\x00-\x1f\x7f\\]+\Z", path) is not None and not {"", ".", ".."} & set(path.split("/"))


def _is_digest(value):
    return isinstance(value, str) and re.match(r"(?:[0-9a-f]{40}|[0-9a-f]{64})\Z", value) is not None


def _parents(path):
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _oid(lfs):
    return lfs.get("oid") if isinstance(lfs, dict) else None


class _TokenStaysHome(HTTPRedirectHandler):
    """Files are served from other hosts by signed addresses: the token must not follow there."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        again = super().redirect_request(req, fp, code, msg, headers, newurl)
        if again is not None and urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            again.headers.pop("Authorization", None)
            again.unredirected_hdrs.pop("Authorization", None)
        return again


class Hub:
    """What a hub answers about one model."""

    def __init__(self, endpoint, model, token=None, proxy=None, timeout=60):
        self.endpoint, self.model, self._token, self._timeout = endpoint.rstrip("/"), model, token, timeout
        self._opener = build_opener(_TokenStaysHome(), ProxyHandler({"http": proxy, "https": proxy} if proxy else {}))

    def open(self, url, start=0):
        headers = {"User-Agent": "mixtral-run"}
        if self._token:
            headers["Authorization"] = "Bearer " + self._token
        if start:
            headers["Range"] = "bytes={}-".format(start)
        try:
            return self._opener.open(Request(url, headers=headers), timeout=self._timeout)
        except HTTPError as error:
            raise HubError("{} answers HTTP {}".format(url, error.code), _remedy(error.code, self.model)) from error
        except (OSError, HTTPException) as error:
            raise HubError("{}: {}".format(url, getattr(error, "reason", error)), "open the way to it, or name a mirror "
                           "(hf_cache_endpoint), a proxy, or a local copy (hf_cache_model_path)") from error  # fmt: skip

    @contextlib.contextmanager
    def open_file(self, commit, file, start):
        """A stream of a file's bytes, and whether it begins at `start` or, with a server that cannot resume, at 0."""
        url = "{}/{}/resolve/{}/{}".format(self.endpoint, self.model, commit, quote(file.path))
        with self.open(url, start) as answer:
            yield answer, answer.status == 206

    def commit(self, revision):
        """The commit that a branch, tag or commit names."""
        url = "{}/api/models/{}/revision/{}".format(self.endpoint, self.model, quote(revision, safe=""))
        with self.open(url) as answer:
            value = _json_of(answer, url)
        return checked_commit(value.get("sha") if isinstance(value, dict) else None, self.endpoint)

    def files(self, commit, patterns):
        """Files of the model whose path matches one of `patterns`."""
        url = "{}/api/models/{}/tree/{}?recursive=true".format(self.endpoint, self.model, commit)
        found = []
        while url:
            with self.open(url) as answer:
                listed = _json_of(answer, url)
                if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
                    raise HubError("{}: the answer is no list of files".format(url), "check hf_cache_endpoint")
                found += [each for each in listed if each.get("type") == "file"]
                following = re.search(r'<([^>]+)>;\s*rel="next"', answer.headers.get("Link", ""))
            url = following.group(1) if following else None
        files = [[each.get("path"), each.get("size"), _oid(each.get("lfs")) or each.get("oid")] for each in found]
        return matching(checked_files(files, self.endpoint), patterns)


def _chunks(stream, what):
    """What a stream holds, bit by bit. Raises HubError where it breaks off with an error, after what had come."""
    while True:
        try:
            chunk = stream.read(CHUNK)
        except (OSError, HTTPException) as error:
            if isinstance(error, IncompleteRead):
                yield error.partial
            raise HubError(
                "{}: the connection broke off: {}".format(what, error), "run again: it goes on there"
            ) from error
        if not chunk:
            return
        yield chunk


def _json_of(answer, url):
    text = b"".join(_chunks(answer, url))
    try:
        return json.loads(text.decode("utf-8"))
    except ValueError as error:
        raise HubError("{}: the answer is not whole: {}".format(url, error), "run again") from error


def _remedy(code, model):
    if code in (401, 403):
        return (
            "{0} is gated: accept its license at https://huggingface.co/{0} with your account, and give a token of that "
            "account by hf_cache_token_file".format(model)
        )
    if code == 404:
        return "check hf_cache_model and hf_cache_model_revision"
    if code == 429:
        return "the hub limits requests: wait some minutes, give a token, or take the model from another host"
    return "try again; what was fetched is kept"


def digest_of(path, like):
    """The hash of a file, of the kind that `like` is: 64 digits are SHA-256, 40 are git's SHA-1 of a blob."""
    if len(like) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


class ModelCache:
    """One model's folder in an HF cache."""

    def __init__(self, home, model, uid=-1, gid=-1):
        self.folder = os.path.join(home, "hub", "models--" + model.replace("/", "--"))
        self._uid, self._gid = uid, gid

    def blob(self, digest):
        return os.path.join(self.folder, "blobs", digest)

    def has(self, file):
        """By name and size; the hash was verified when the blob got its name."""
        try:
            return os.path.getsize(self.blob(file.digest)) == file.size
        except OSError:
            return False

    def fetch(self, source, commit, file):
        """Fetch one file from a Hub or a Peer, going on where an earlier run stopped. Raises HubError where size or hash is wrong."""
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
        """Give a complete file its name; remove it and raise HubError where it is not what it should be."""
        size = os.path.getsize(partial)
        if size < file.size:
            raise HubError(
                "{}: {} of {} bytes arrived".format(file.path, size, file.size), "run again: it goes on there"
            )
        found = digest_of(partial, file.digest)
        if size != file.size or found != file.digest:
            os.unlink(partial)
            raise HubError(
                "{}: expected {} bytes with hash {}; found {} bytes with {}".format(
                    file.path, file.size, file.digest, size, found
                ),
                "run again: the file is fetched anew",
            )
        self._own(partial)
        os.rename(partial, self.blob(file.digest))

    def publish(self, revision, commit, files):
        """Make the snapshot visible: links first, the name of the revision last. Returns whether anything changed."""
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
