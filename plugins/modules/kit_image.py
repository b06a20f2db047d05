#!/usr/bin/python
"""Build, pull by digest, or load the image that jobs run in, and repeat that only if an input changed."""

from __future__ import annotations

DOCUMENTATION = """
module: kit_image
short_description: Provide the image that jobs run in, from one of four sources
description:
  - Called through the action plugin of the same name, which sends the build context when this module asks for it.
  - The label C(org.mixtral-run.inputs) of a built image is the hash of all its inputs.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  state: {description: C(absent) removes the images that the kit built or loaded., type: str, choices: [present, absent], default: present}
  source: {description: Source of the image., type: str, choices: [build, registry, archive, megatron_bridge], required: true}
  name: {description: Name of the image on the host., type: str, required: true}
  inputs: {description: Hash of the build context., type: str, required: true}
  look: {description: "Only report in C(spread) whether the host has the image, for the plan of copies from host to host.", type: bool, default: false}
  user: {description: "Login user. Empty means the user who became root.", type: str, default: ""}
  askers: {description: "Hosts of this play. With a look, keys for them that a killed run left are taken back.", type: list, elements: str, default: []}
  run_id: {description: "Name of this run of Ansible, which the action plugin adds. A look leaves the keys of this run.", type: str, default: ""}
  sent: {description: Path of the build context or archive on the host., type: path}
"""

import json
import os
import re
import shutil
import tarfile
import tempfile

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.commands import last_lines, run
from ..module_utils.mixtral_run_host.engine import image_inputs
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.spread.archive import ImageArchive, image_report
from ..module_utils.mixtral_run_host.spread.keys import forget_copies
from ..module_utils.mixtral_run_host.spread.plan import ME, SOURCE
from ..module_utils.mixtral_run_host.start import run_module

LABEL = "org.mixtral-run.inputs"
BASE_LABEL = "org.mixtral-run.base"
SBOM_LABEL = "org.mixtral-run.sbom"
SBOM = "/opt/mixtral-run/sbom.cdx.json"
WORK_FOLDER = "/var/lib/mixtral-run/build"
TEXT = ("base_image", "pip_index_url", "pip_trusted_host", "wheelhouse", "proxy", "no_proxy", "registry_reference",
        "archive", "archive_name", "archive_digest", "repository", "ref", "dockerfile", "user", "run_id")  # fmt: skip


def main():
    spec = {name: {"type": "str", "default": ""} for name in TEXT}
    spec.update(
        host={"type": "str", "required": True},
        state={"type": "str", "choices": ["present", "absent"], "default": "present"},
        source={"type": "str", "choices": ["build", "registry", "archive", "megatron_bridge"], "required": True},
        name={"type": "str", "required": True},
        inputs={"type": "str", "required": True},
        sent={"type": "path"},
        look={"type": "bool", "default": False},
        askers={"type": "list", "elements": "str", "default": []},
        variant={"type": "str", "choices": ["auto", "cu130", "cu126", "cpu"], "default": "auto"},
        base_images={"type": "dict", "default": {}},
        base_digests={"type": "dict", "default": {}},
        base_lock={"type": "dict", "default": {}},
        locks={"type": "dict", "default": {}},
        torch_index_urls={"type": "dict", "default": {}},
        apt_packages={"type": "list", "elements": "str", "default": []},
        wheelhouse_on_host={"type": "bool", "default": False},
        archive_on_host={"type": "bool", "default": False},
        uid={"type": "int", "default": 1000},
        gid={"type": "int", "default": 1000},
        timeout_seconds={"type": "int", "default": 5400},
    )
    run_module(act, spec)


def act(module):
    image = Image(module)
    if module.params["state"] == "absent":
        image.leave()
    getattr(image, module.params["source"])()
    image.exit(changed=False)


class Image:
    """State of one run of the module."""

    def __init__(self, module):
        self.module, self.params = module, module.params
        self.record = Record("images", check_mode=module.check_mode)
        self.name = self.params["name"]
        self.swept = self.params["look"] and not module.check_mode and forget_copies(
            self.params["user"], self.params["run_id"], self.params["askers"])  # fmt: skip
        self.proxy = image_inputs.proxy_variables(self.params["proxy"], self.params["no_proxy"])
        self.bridge = None
        self.identity = ""  # hosts with the same one can take the image from each other
        self.fetched = []  # further names of the image, which the kit added
        answer = run(["docker", "image", "inspect", self.name], timeout=30)
        self.there = json.loads(answer.out)[0] if answer.code == 0 else None

    def exit(self, changed, holds=True, **more):
        facts = {"id": self.there["Id"] if self.there else None, "name": self.name}
        spread = image_report(self.params["source"], self.identity, facts["id"] if holds else None)
        left = ImageArchive().exists()
        self.module.exit_json(changed=changed or self.swept, image=facts, spread=spread, archive_left=left, **more)

    def stop_here(self, **more):
        """End the module where the image is missing, in check mode or if only a report is wanted."""
        if self.module.check_mode or self.params["look"]:
            self.exit(changed=self.module.check_mode, holds=False, **more)

    def build(self, base=None, extra=""):
        params = self.params
        variant = self._variant()
        base = base or params["base_image"] or self._listed_base(variant)
        locks = [name for name in ("common", variant) if name in params["locks"]]
        # The default index has the build of torch that a lock names without a local version such as +cu126.
        own_index = variant not in locks or params["locks"][variant]
        arguments = {
            "BASE_IMAGE": base,
            "APT_PACKAGES": " ".join(params["apt_packages"]),
            "LOCKS": " ".join(locks),
            "LOCKS_ARE_ALL": "1" if variant in locks else "",
            "TORCH_INDEX_URL": params["torch_index_urls"].get(variant, "") if own_index else "",
            "PIP_INDEX_URL": params["pip_index_url"],
            "PIP_TRUSTED_HOST": params["pip_trusted_host"],
            "CONTAINER_UID": str(params["uid"]),
            "CONTAINER_GID": str(params["gid"]),
        }
        wheels = image_inputs.listed(self._wheel_paths())
        inputs = self.identity = image_inputs.hash_of([params["inputs"], arguments, wheels, extra])
        if self._labels().get(LABEL) == inputs:
            self._remember(inputs)
            self.exit(changed=False, variant=variant)
        self.stop_here(variant=variant)
        self._need_engine()
        if not params["sent"]:
            self.module.exit_json(changed=True, send=True)
        if locks and variant not in locks:
            self.module.warn(
                "{}: torch for {} is installed by its version, not by its hash. `make lock` where {} can be reached "
                "writes roles/image/files/locks/{}.txt".format(
                    params["host"], variant, params["torch_index_urls"].get(variant, "its index"), variant
                )
            )
        self._build(arguments, inputs)
        self._remember(inputs)
        self.exit(changed=True, variant=variant)

    def registry(self):
        reference = self.params["registry_reference"]
        if not re.search(r"@sha256:[0-9a-f]{64}$", reference):
            self._refuse("image_registry_reference names no digest", "NAME@sha256:DIGEST", reference or "nothing",
                         "`docker buildx imagetools inspect NAME:TAG` prints the digest")  # fmt: skip
        self.identity = reference
        known = run(["docker", "image", "inspect", "--format", "{{.Id}}", reference], timeout=30)
        # An image that came from another host bears the name of no registry; its record has the reference.
        if self.there and (known.out.strip() == self.there["Id"] or self._recorded(reference)):
            self.exit(changed=False)
        self._fetch(["docker", "pull", "--quiet", reference], reference, "the image can be pulled by its digest",
                    "429: the registry limits pulls, log in (`docker login`) or use a mirror; 401: log in on the host")  # fmt: skip

    def archive(self):
        params = self.params
        path = params["archive"] if params["archive_on_host"] else params["sent"]
        inputs = params["inputs"]
        if params["archive_on_host"]:
            if not os.path.isfile(path):
                self._refuse(
                    "The archive is not on the host", "a file of `docker save`", "no file " + path, "copy it there"
                )
            inputs = "{} {}".format(os.path.getsize(path), int(os.path.getmtime(path)))
        expected = params["archive_digest"]
        if expected and not image_inputs.DIGEST.match(expected):
            self._refuse("image_archive_digest is no digest", "sha256: and 64 hex digits", expected,
                         "`sha256sum FILE` prints the digits")  # fmt: skip
        inputs = " ".join(filter(None, (inputs, expected)))
        self.identity = inputs
        if self._recorded(inputs):
            self.exit(changed=False)
        if params["look"]:
            self.stop_here()
        if not self.module.check_mode and not path:
            self.module.exit_json(changed=True, send=True)
        found = image_inputs.digest_of(path) if expected and path else expected
        if found != expected:
            self._refuse("The archive is another file than image_archive_digest names; nothing was loaded",
                         expected, found,
                         "make the archive again, or correct image_archive_digest if the file is the right one")  # fmt: skip
        self._fetch(["docker", "load", "--input", path], params["archive_name"], "a file of `docker save`",
                    "make it again: `docker save NAME -o FILE`", inputs)  # fmt: skip

    def megatron_bridge(self):
        params = self.params
        if not re.match(r"^[0-9a-f]{40}$", params["ref"]):
            self._refuse("image_megatron_bridge_ref is not a full commit", "40 hex digits", params["ref"] or "nothing",
                         "pin one: `git ls-remote {}`".format(params["repository"]))  # fmt: skip
        base = "mixtral-run-megatron-bridge:" + params["ref"][:12]
        has_dockerfile = self.record.values.get(self.name, {}).get("bridge", {}).get(params["ref"])
        if has_dockerfile is None or (has_dockerfile and run(["docker", "image", "inspect", base], timeout=30).code):
            self.stop_here()
            self._need_engine()
            has_dockerfile = self._build_bridge(base)
        self.bridge = {params["ref"]: has_dockerfile}
        self.fetched = [base] if has_dockerfile else []
        self.build(base=base if has_dockerfile else None, extra=params["ref"])

    def _build_bridge(self, base):
        """Clone Megatron-Bridge at the pinned commit and build its Dockerfile. Return False if it has none."""
        params, folder = self.params, os.path.join(WORK_FOLDER, "Megatron-Bridge")
        os.makedirs(folder, exist_ok=True)
        steps = (["init", "--quiet"], ["fetch", "--depth", "1", params["repository"], params["ref"]],
                 ["checkout", "--quiet", "--force", "FETCH_HEAD"], ["submodule", "update", "--init", "--depth", "1"])  # fmt: skip
        for step in steps:
            answer = run(["git", "-C", folder] + step, timeout=1800, environment=self.proxy)
            if answer.code:
                self._refuse("Megatron-Bridge cannot be cloned", params["ref"], last_lines(answer, 3),
                             "install git on the host, open the way to it, or name a mirror "
                             "(image_megatron_bridge_repository)")  # fmt: skip
        dockerfile = os.path.join(folder, params["dockerfile"])
        if not os.path.isfile(dockerfile):
            self.module.warn("Megatron-Bridge has no {} at {}: the kit's own is built".format(
                params["dockerfile"], params["ref"][:12]))  # fmt: skip
            return False
        argv = ["docker", "build", "--tag", base, "--file", dockerfile] + image_inputs.build_args(self.proxy) + [folder]
        answer = run(argv, timeout=params["timeout_seconds"])
        if answer.code:
            self._refuse(
                "Megatron-Bridge's Dockerfile cannot be built", "docker build", last_lines(answer, 12), "see above"
            )
        return True

    def leave(self):
        for name, entry in (mine := dict(self.record.values)).items():
            if not self.module.check_mode:
                for each in [name] + entry.get("fetched", []):
                    # Without --force, an image that a container uses stays.
                    run(["docker", "image", "rm", each], timeout=300)
                del self.record.values[name]
        self.record.save()
        if not self.module.check_mode:
            shutil.rmtree(WORK_FOLDER, ignore_errors=True)
        self.module.exit_json(changed=bool(mine), removed=sorted(mine))

    def _build(self, arguments, inputs):
        params = self.params
        os.makedirs(WORK_FOLDER, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="context-", dir=WORK_FOLDER)
        try:
            with tarfile.open(params["sent"]) as context:
                context.extractall(folder)
            image_inputs.place(self._wheel_paths(), os.path.join(folder, "wheelhouse"))
            base = self._pulled(arguments["BASE_IMAGE"])
            argv = ["docker", "build", "--tag", self.name] + image_inputs.build_args(dict(arguments, **self.proxy))
            answer = run(argv + [folder], timeout=params["timeout_seconds"])
            if answer.code == 0:
                answer = self._label_image(folder, {LABEL: inputs, BASE_LABEL: base})
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if answer.code:
            self._refuse_if_disk_is_full(answer)
            self._refuse("The image cannot be built", "docker build ends with 0", last_lines(answer, 15),
                         image_inputs.remedy(answer))  # fmt: skip

    def _pulled(self, base):
        """Have the base image on the host and return its name with its digest; its ID if it comes from no registry."""
        inspect = ["docker", "image", "inspect", base]
        answer = run(inspect, timeout=30)
        if answer.code:
            answer = run(["docker", "pull", "--quiet", base], timeout=self.params["timeout_seconds"])
            if answer.code == 0:
                self.fetched.append(base)
                answer = run(inspect, timeout=30)
        if answer.code:
            self._refuse_if_disk_is_full(answer)
            next_step = self._base_remedy(answer, base.partition("@")[0])
            self._refuse("The base image cannot be pulled", base, last_lines(answer, 4), next_step)
        found = image_inputs.with_digest(base, json.loads(answer.out)[0])
        earlier = self._labels().get(BASE_LABEL, found)
        if earlier != found and earlier.partition("@")[0] == found.partition("@")[0]:
            self.module.warn("{}: the base image is another one than before, under the same tag: {}, then {}. "
                             "image_base_digests pins it".format(self.params["host"], earlier, found))  # fmt: skip
        return found

    def _base_remedy(self, answer, name):
        """Return the next step after a pull of the base image that failed. name: of the image, without its digest."""
        local = run(["docker", "image", "inspect", name], timeout=30)
        variant = None if self.params["base_image"] else self._variant()
        return image_inputs.base_remedy(answer, name, local, variant)

    def _label_image(self, folder, labels):
        """Add labels to the built image: those given, and place and hash of the bill of materials in it.

        A build that is killed before leaves an image without the label of its inputs, which is built again.
        """
        argv = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "sha256sum", self.name, SBOM]
        answer = run(argv, timeout=120)
        if answer.code:
            return answer
        labels = dict(labels, **{SBOM_LABEL: SBOM, SBOM_LABEL + ".sha256": answer.out[:64]})
        return run(image_inputs.label_build(self.name, labels, os.path.join(folder, "labels")), timeout=120)

    def _fetch(self, argv, source, expected, remedy, inputs=None):
        self.stop_here()
        self._need_engine()
        if source != self.name and run(["docker", "image", "inspect", source], timeout=30).code:
            self.fetched.append(source)
        answer = run(argv, timeout=self.params["timeout_seconds"])
        if answer.code == 0 and source != self.name:
            answer = run(["docker", "tag", source, self.name])
        if answer.code:
            self._refuse_if_disk_is_full(answer)
            self._refuse(
                "The image cannot be had from " + self.params["source"], expected, last_lines(answer, 4), remedy
            )
        before = self.there["Id"] if self.there else None
        self._remember(inputs or source)
        self.exit(changed=before != self.there["Id"])

    def _remember(self, inputs):
        answer = run(["docker", "image", "inspect", self.name], timeout=30)
        if answer.code:
            self._refuse("The image is not there", self.name, last_lines(answer, 2),
                         "image_archive_name names what the file holds")  # fmt: skip
        self.there = json.loads(answer.out)[0]
        entry = {"id": self.there["Id"], "inputs": inputs, "source": self.params["source"]}
        known = self.record.values.get(self.name, {}).get("fetched", [])
        fetched = sorted(set(known + self.fetched))
        if fetched:
            entry["fetched"] = fetched  # for `absent`, even after the kit has changed to another image
        if self.bridge:
            entry["bridge"] = self.bridge  # records if the commit has a Dockerfile, which saves a clone
        if self.record.values.get(self.name) != entry:
            self.record.values[self.name] = entry
            self.record.save()

    def _recorded(self, inputs):
        known = self.record.values.get(self.name, {})
        return bool(self.there) and known.get("inputs") == inputs and known.get("id") == self.there["Id"]

    def _labels(self):
        return (self.there or {}).get("Config", {}).get("Labels") or {}

    def _listed_base(self, variant):
        """Return the base image of image_base_images with the digest of image_base_digests, or else of the lock."""
        name = self.params["base_images"].get(variant, "")
        digest = self.params["base_digests"].get(variant, self.params["base_lock"].get(name)) or ""
        if digest and not image_inputs.DIGEST.match(digest):
            self._refuse("image_base_digests has no digest for " + variant, "sha256: and 64 hex digits", digest,
                         "`docker buildx imagetools inspect {}` prints it".format(name))  # fmt: skip
        return name + "@" + digest if digest else name

    def _variant(self):
        if self.params["variant"] != "auto":
            return self.params["variant"]
        state = probe.gpus()
        if state["sick"]:
            self.module.fail_json(msg=probe.why_sick(state, self.params["host"]))
        driver = state["driver"]
        if driver is None:
            return "cpu"
        variant = image_inputs.variant_for(driver)
        if variant:
            return variant
        return self._refuse("No CUDA build of torch runs on this driver", "driver 525 or newer", "driver " + driver,
                            "install a newer driver, then reboot")  # fmt: skip

    def _wheel_paths(self):
        params = self.params
        if not (params["wheelhouse"] and params["wheelhouse_on_host"]):
            return []
        names = sorted(os.listdir(params["wheelhouse"])) if os.path.isdir(params["wheelhouse"]) else []
        wheels = [os.path.join(params["wheelhouse"], name) for name in names if name.endswith(".whl")]
        if not wheels and not self.module.check_mode:
            self._refuse("The wheelhouse is empty", "wheels in " + params["wheelhouse"], "none on the host",
                         "copy them there, or set image_wheelhouse_on_host: false")  # fmt: skip
        return wheels

    def _need_engine(self):
        answer = run(["docker", "version", "--format", "{{.Server.Version}}"], timeout=30)
        if answer.code:
            self._refuse(
                "The Docker engine does not answer", "a running engine", last_lines(answer, 2), "run the docker role"
            )

    def _refuse_if_disk_is_full(self, answer):
        found = image_inputs.full_disk(answer)
        if found:
            self._refuse("The engine has no space for the image", "space for the image where the engine stores images",
                         found, image_inputs.SPACE_REMEDY, blame=ME)  # fmt: skip

    def _refuse(self, what, expected, found, next_step, blame=SOURCE):
        where = "{}: image {}".format(self.params["host"], self.name)
        message = explain(what + ".", where=where, expected=expected, found=found, next_step=next_step)
        self.module.fail_json(msg=message, found="{}: {}".format(what, found), blame=blame)


if __name__ == "__main__":
    main()
