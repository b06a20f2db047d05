"""Download of a model into the host's HF cache by `hf download` of huggingface_hub, in a container of the kit's image.

The host itself needs no Python package. The container runs as the owner of the cache, reads the token from the cache's
own file, and uses the host's certificates.
"""

from __future__ import annotations

import json
import os
import re

from ..commands import MISSING, TIMED_OUT, last_lines, run
from ..spread.blobs import CopyError
from .model_cache import checked_commit, checked_files

HOME = "/huggingface"
LISTING_CACHE = "/tmp/listing"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
LISTING_SECONDS = 300
DOWNLOAD_SECONDS = 7 * 86400
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


class HubDownload:
    """Download of one model from the hub with the `hf` of an image.

    proxy and no_proxy reach the container through the environment, because a proxy's address may contain a password.
    """

    def __init__(self, image, home, model, revision, patterns, endpoint, proxy, no_proxy, uid, gid):
        self._image, self._home, self._model, self._revision = image, home, model, revision
        self._patterns, self._endpoint, self._user = patterns, endpoint, "{}:{}".format(uid, gid)
        self._environment = {"HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "NO_PROXY": no_proxy} if proxy else {}
        self._container = "mixtral-run-model-" + re.sub(r"[^\w.-]", "-", model)

    def missing_image(self):
        """Return why the image cannot be used on this host; None if it can."""
        answer = run(["docker", "image", "inspect", "--format", "{{.Id}}", self._image], timeout=60)
        if answer.code == MISSING:
            return "there is no docker program"
        return last_lines(answer, 2) or "docker image inspect failed" if answer.code else None

    def missing_bytes(self):
        """Return the approximate number of bytes that are still missing (`hf` rounds sizes). Write nothing.

        Return None if the hub gives no listing; the error of the download itself then states the reason.
        Raise CopyError if no file matches.
        """
        answer = run(self.argv(["--dry-run"], listing=True), timeout=LISTING_SECONDS, environment=self._environment)
        if answer.code:
            return None
        listed = self._json_of(answer)
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise CopyError("hf download --dry-run prints no list of files", "take the image of this kit's version")
        if not listed:
            raise CopyError("no file of the model matches {}".format(self._patterns), "see hf_cache_model_patterns")
        here = set(self._snapshot_names())
        return sum(_size_of(each.get("size")) for each in listed if each.get("file") not in here)

    def fetch(self):
        """Download the missing files. Return the commit and the files of its snapshot. Raise CopyError on failure."""
        # The container of a play that was killed continues its download, so wait for it.
        run(["docker", "wait", self._container], timeout=DOWNLOAD_SECONDS)
        answer = run(self.argv([], self._container), timeout=DOWNLOAD_SECONDS, environment=self._environment)
        if answer.code:
            said = _plain(answer.err) or last_lines(answer, 4)
            raise CopyError(said or "hf download ended with {}".format(answer.code), self._remedy(answer, said))
        printed = self._json_of(answer)
        path = printed.get("path") if isinstance(printed, dict) else None
        commit = checked_commit(os.path.basename(path) if isinstance(path, str) else None, "hf download")
        return commit, self.files(commit)

    def files(self, commit):
        """Return the files of a snapshot. They are links into blobs/, where each file is named by its hash."""
        folder = os.path.join(self._snapshots(), commit)
        found = []
        for parent, _, names in os.walk(folder):
            for name in names:
                link = os.path.join(parent, name)
                if os.path.islink(link) and os.path.isfile(link):
                    digest = os.path.basename(os.readlink(link))
                    found.append([os.path.relpath(link, folder), os.path.getsize(link), digest])
        return checked_files(sorted(found), "hf download")

    def _snapshots(self):
        return os.path.join(self._home, "hub", "models--" + self._model.replace("/", "--"), "snapshots")

    def _snapshot_names(self):
        for parent, _, names in os.walk(self._snapshots()):
            for name in names:
                if os.path.isfile(os.path.join(parent, name)):
                    yield os.path.relpath(os.path.join(parent, name), self._snapshots()).partition("/")[2]

    def argv(self, words, name=None, listing=False):
        """Return docker's argument list for one `hf download`. listing: mount the cache of the host read-only."""
        argv = ["docker", "run", "--rm", "--network", "host", "--user", self._user]
        argv += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "4096"]
        argv += ["--read-only", "--tmpfs", "/tmp:mode=1777", "--tmpfs", "/home/mixtral:mode=1777"]
        argv += ["--name", name] if name else []
        argv += ["--mount", "type=bind,source={},target={}".format(self._home, HOME) + ",readonly" * listing]
        argv += ["--env", "HF_HUB_CACHE=" + LISTING_CACHE] if listing else []
        argv += ["--env", "HF_HOME=" + HOME, "--env", "HF_TOKEN_PATH={}/token".format(HOME)]
        argv += ["--env", "HF_ENDPOINT=" + self._endpoint, "--env", "HF_HUB_DISABLE_TELEMETRY=1"]
        argv += ["--env", "HF_HUB_DISABLE_UPDATE_CHECK=1"]
        if os.path.isfile(CERTIFICATES):
            argv += ["--mount", "type=bind,source={0},target={0},readonly".format(CERTIFICATES)]
            argv += ["--env", "SSL_CERT_FILE=" + CERTIFICATES]
        argv += [word for variable in sorted(self._environment) for word in ("--env", variable)]
        argv += [self._image, "hf", "download", self._model, "--revision", self._revision, "--json"]
        return argv + [word for pattern in self._patterns for word in ("--include", pattern)] + words

    def _json_of(self, answer):
        try:
            return json.loads(answer.out)
        except ValueError as error:
            raise CopyError(
                "hf download --json prints no JSON: {}".format(error), "take the image of this kit's version"
            ) from error

    def _remedy(self, answer, said):
        if answer.code == TIMED_OUT:
            return "run again: the download continues"
        if answer.code == 125:
            return "the engine refused the container: run the docker and image roles"
        if re.search(r"approval|denied|gated|401|403|[Uu]nauthorized", said):
            return (
                "{0} is gated: accept its license at https://huggingface.co/{0} with your account, and give a token "
                "of that account by hf_cache_token_file".format(self._model)
            )
        if re.search(r"429|[Rr]ate limit|Too Many Requests", said):
            return "the hub limits requests: wait some minutes, give a token, or take the model from another host"
        if re.search(r"[Nn]ot found", said) and not re.search(r"Local entry|Connection|resolve|Errno", said):
            return "check hf_cache_model and hf_cache_model_revision"
        return (
            "run again: the download continues; if the hub cannot be reached, name a mirror (hf_cache_endpoint), a "
            "proxy, or a local copy (hf_cache_model_path)"
        )


def _size_of(text):
    """Return the number of bytes of a size that `hf` prints: `3.0M`, or `-` for a file that exists (0 bytes)."""
    match = re.match(r"([0-9.]+)([KMGT]?)\Z", text if isinstance(text, str) else "")
    return float(match.group(1)) * _UNITS[match.group(2)] if match else 0.0


def _plain(text):
    """Return the last lines that `hf` printed, without colors and hints."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in text.splitlines()]
    return "\n".join([line for line in lines if line and not line.startswith("Hint:")][-4:])
