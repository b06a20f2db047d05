#!/usr/bin/python
"""Add an apt repository with a pinned key and a deb822 source, and disable older sources of the same URL."""

from __future__ import annotations

DOCUMENTATION = """
module: apt_source
short_description: Add an apt repository, with its key pinned by fingerprint
description:
  - Downloads the key, refuses any but the pinned one, and writes a deb822 source. Source files that name the same
    repository are disabled first, because apt fails if two entries name different keys.
  - In C(uri), C(suite) and C(key_url), C({id}), C({codename}) and C({arch}) are filled in from the host.
options:
  name: {description: Name of the files., type: str, required: true}
  uri: {description: URI of the repository., type: str, required: true}
  suite: {description: "Suite, or C(/) for a flat repository.", type: str, default: "{codename}"}
  components: {description: Components. Empty for a flat repository., type: str, default: ""}
  key_url: {description: URL of the key., type: str, required: true}
  key_fingerprint: {description: The only fingerprint that is accepted., type: str, required: true}
  proxy: {description: Proxy for the download of the key., type: str}
  no_proxy: {description: "Comma-separated hosts that are reached without the proxy.", type: str, default: ""}
  state: {description: "C(absent) removes the source and the key, or restores the files that existed before, and those that were disabled.", type: str, choices: [present, absent], default: present}
"""

import glob
import os

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.apt import apt_sources, openpgp
from ..module_utils.mixtral_run_host.files import Record, explain, read_text, remove, rewrite, write_text
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "name": {"type": "str", "required": True},
    "uri": {"type": "str", "required": True},
    "suite": {"type": "str", "default": "{codename}"},
    "components": {"type": "str", "default": ""},
    "key_url": {"type": "str", "required": True, "no_log": False},
    "key_fingerprint": {"type": "str", "required": True, "no_log": False},
    "proxy": {"type": "str"},
    "no_proxy": {"type": "str", "default": ""},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

SOURCES = "/etc/apt/sources.list.d"
KEYRINGS = "/etc/apt/keyrings"


def main():
    run_module(act, OPTIONS)


def act(module):
    params = module.params
    source = os.path.join(SOURCES, params["name"] + ".sources")
    key = os.path.join(KEYRINGS, params["name"] + ".asc")
    record = Record("apt_sources", check_mode=module.check_mode)
    if params["state"] == "absent":
        _absent(module, record)

    release, arch = probe.os_release(), probe.architecture()
    uri = apt_sources.expand(params["uri"], release, arch)
    wanted = apt_sources.render(
        [
            ("Types", "deb"),
            ("URIs", uri),
            ("Suites", apt_sources.expand(params["suite"], release, arch)),
            ("Components", params["components"]),
            ("Architectures", arch),
            ("Signed-By", key),
        ]
    )
    key_text = _pinned_key(module, key, apt_sources.expand(params["key_url"], release, arch))
    rivals = _rivals(source, uri)
    before = read_text(source)
    if before != wanted:
        _need_repository(module, uri, apt_sources.expand(params["suite"], release, arch), arch)
    changed = key_text is not None or bool(rivals) or before != wanted
    if not module.check_mode:
        _remember(record, params["name"], [key] * (key_text is not None) + [source] * (before != wanted))
        if key_text is not None:
            write_text(key, key_text)
        _switch_off(record, params["name"], rivals)
        if before != wanted:
            write_text(source, wanted)
    header = {"before_header": source, "after_header": source}
    module.exit_json(
        changed=changed, switched_off=sorted(rivals), uri=uri, diff=dict(before=before or "", after=wanted, **header)
    )


def _remember(record, name, paths):
    """Record the files at `paths` before they are written, so that `absent` can restore files that the host had."""
    theirs = record.values.setdefault(name, {})
    for path in paths:
        theirs.setdefault(path, read_text(path))
    if not theirs:
        del record.values[name]  # both exist with the right content already, so they do not belong to the kit
    record.save()


def _switch_off(record, name, rivals):
    """Rewrite the source files of others, and record their text, so that `absent` can switch them on again."""
    for path, text in rivals.items():
        now, known = read_text(path), record.values.setdefault(_off(name), {}).get(path, {})
        before = known["before"] if known.get("after") == now else now
        record.values[_off(name)][path] = {"before": before, "after": text}
        record.save()
        rewrite(path, text)


def _off(name):
    """Return the key of the record for the sources of others that were switched off."""
    return name + "_switched_off"


def _switch_on(module, rivals):
    """Give back the source files of others, except those that somebody has changed since."""
    for path, texts in sorted(rivals.items()):
        now = read_text(path)
        if now == texts["after"]:
            rewrite(path, texts["before"])
        elif now not in (None, texts["before"]):
            module.warn(
                "{} was changed after the kit switched entries off in it, and is left as it is: look for the comments that "
                "name mixtral-run".format(path)
            )


def _absent(module, record):
    theirs, rivals = record.values.pop(module.params["name"], {}), record.values.pop(_off(module.params["name"]), {})
    if not module.check_mode:
        _switch_on(module, rivals)
        for path, text in theirs.items():
            if text is None:
                remove(path)
            else:
                rewrite(path, text)
        record.save()
    module.exit_json(changed=bool(theirs or rivals))


def _need_repository(module, uri, suite, arch):
    """Fail before anything is written if the repository does not answer: apt would leave the source in place."""
    place = "InRelease" if suite.endswith("/") else "dists/{}/InRelease".format(suite)
    url = "{}/{}".format(uri.replace("$(ARCH)", arch).rstrip("/"), place)
    _fetched(module, url, "The package repository does not answer", "the index of suite {}".format(suite),
             "404: it has no such release; else ")  # fmt: skip


def _fetched(module, url, what, expected, before_next=""):
    """Return the content of the URL. Fail the module with the message `what` if it cannot be fetched."""
    try:
        return _open(module, url)
    except (OSError, ValueError) as error:
        module.fail_json(
            msg=explain(
                "{}; nothing was changed.".format(what),
                where=url,
                expected=expected,
                found=str(error),
                next_step=before_next + "open the way to it, or name a mirror or proxy in group_vars",
            )
        )


def _open(module, url):
    # Imported here because the import takes longer than a whole run that finds the key and the source in place.
    from ansible.module_utils.urls import open_url

    proxy = module.params["proxy"]
    if proxy:
        os.environ["http_proxy"] = os.environ["https_proxy"] = proxy
        os.environ["no_proxy"] = module.params["no_proxy"]
    return open_url(url, timeout=30, http_agent="mixtral-run").read()


def _pinned_key(module, path, url):
    """Return the text of the key if it has to be written, None if the pinned key is in place. Fail on any other key."""
    pinned = module.params["key_fingerprint"].replace(" ", "").upper()
    there = read_text(path)
    if there is not None and _fingerprints(there.encode()) == [pinned]:
        return None
    expected = "the key with fingerprint {}".format(pinned)
    data = _fetched(module, url, "The repository's key cannot be fetched", expected)
    found = _fingerprints(data)
    if found != [pinned]:
        module.fail_json(
            msg=explain(
                "The repository's key is not the pinned one; nothing was changed.",
                where=url,
                expected=pinned,
                found=", ".join(found) or "no OpenPGP key",
                next_step="find out why before you trust it: a mirror of your own signs with its own key, whose "
                "fingerprint goes into the role's ..._key_fingerprint",
            )
        )
    return data.decode("ascii", "surrogateescape")


def _fingerprints(data):
    try:
        return openpgp.primary_fingerprints(data)
    except ValueError:
        return []


def _rivals(source, uri):
    """Return the other source files that name the repository, with their text after its entries are disabled."""
    found = {}
    folder = glob.glob(os.path.join(SOURCES, "*.list")) + glob.glob(os.path.join(SOURCES, "*.sources"))
    for path in ["/etc/apt/sources.list"] + sorted(folder):
        text = read_text(path, "")
        off = apt_sources.without(text, uri, os.path.basename(path), source) if path != source else text
        if off != text:
            found[path] = off
    return found


if __name__ == "__main__":
    main()
