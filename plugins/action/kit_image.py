"""Action plugin of `kit_image`, which runs on the operator's machine.

It asks the host whether the image is missing, and sends the build context or the archive only then.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import re
import tarfile
import tempfile
from pathlib import Path

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

LOCAL_ONLY = ("kit_folder", "files_folder", "ca_bundle", "requirements", "require_hashes")


class ActionModule(ActionBase):
    """Action that builds the same context, byte for byte, from the same files, so that its hash shows any change."""

    def run(self, tmp=None, task_vars=None):
        from ..plugin_utils.run_id import run_id  # a test loads this file without its collection

        result = super().run(tmp, task_vars)
        arguments = {**self._task.args, "run_id": run_id()}
        local = {name: arguments.pop(name, None) for name in LOCAL_ONLY}
        context = {}
        if arguments["state"] == "present" and arguments["source"] in ("build", "megatron_bridge"):
            context = _context(local, arguments)
            arguments["locks"] = _locks(context)
        arguments["inputs"] = _digest(context)
        sends_archive = arguments["source"] == "archive" and not arguments["archive_on_host"]
        if arguments["state"] == "present" and sends_archive:
            if not Path(arguments["archive"]).is_file():
                raise AnsibleActionFail(f"image_archive: there is no file {arguments['archive']!r} on this machine")
            arguments["inputs"] = _file_digest(Path(arguments["archive"]))
        answer = self._execute_module(module_args=arguments, task_vars=task_vars)
        if not answer.get("send"):
            return {**result, **answer}
        remote = self._make_tmp_path()
        try:
            arguments["sent"] = self._connection._shell.join_path(remote, "sent.tar")
            if sends_archive:
                self._transfer_file(arguments["archive"], arguments["sent"])
            else:
                with tempfile.NamedTemporaryFile(suffix=".tar") as file:
                    _write_tar(context, file)
                    self._transfer_file(file.name, arguments["sent"])
            answer = self._execute_module(module_args=arguments, task_vars=task_vars)
            return {**result, **answer}
        finally:
            self._remove_tmp_path(remote)


def _context(local, arguments):
    """Return the files of the build context by name. The values are bytes, or paths for large files."""
    files_folder = Path(local["files_folder"])
    context = {name: (files_folder / name).read_bytes() for name in ("Dockerfile", "sbom.py")}
    requirements = local["requirements"] or []
    context["requirements.txt"] = (
        "".join(f"{line}\n" for line in requirements).encode()
        if requirements
        else (files_folder / "requirements.txt").read_bytes()
    )
    context["locks/README.txt"] = b"Versions and hashes of packages.\n"
    if local["require_hashes"] and not requirements:
        context.update({f"locks/{path.name}": path.read_bytes() for path in sorted(files_folder.glob("locks/*.txt"))})
    context["ca/README.txt"] = b"Certificates of your own proxy, if any.\n"
    context["wheelhouse/README.txt"] = b"Wheels to install from, if any.\n"
    if local["ca_bundle"]:
        context["ca/ca-bundle.crt"] = _required(Path(local["ca_bundle"]), "image_ca_bundle").read_bytes()
    kit = Path(local["kit_folder"]) if local["kit_folder"] else _running_kit()
    for path in sorted(kit.rglob("*")):
        place = path.relative_to(kit)
        # An installed kit contains the playbooks and roles, which jobs do not need.
        if path.is_file() and not {"provisioning", "__pycache__"} & set(place.parts[:-1]):
            context[f"mixtral_run/{place}"] = path.read_bytes()
    if "mixtral_run/__init__.py" not in context:
        raise AnsibleActionFail(f"image_kit_folder: {kit} is not the package mixtral_run")
    if arguments["wheelhouse"] and not arguments["wheelhouse_on_host"]:
        wheels = sorted(_required(Path(arguments["wheelhouse"]), "image_wheelhouse").glob("*.whl"))
        if not wheels:
            raise AnsibleActionFail(f"image_wheelhouse: no wheels in {arguments['wheelhouse']}")
        context.update({f"wheelhouse/{path.name}": path for path in wheels})
    return context


def _locks(context):
    """Return the names of the locks in a context. True: its torch has a local version, which only its own index has."""
    found = {Path(name).stem: content for name, content in context.items() if name.startswith("locks/")}
    return {
        name: re.search(rb"^torch==[^ \n]*\+", content, re.MULTILINE) is not None
        for name, content in found.items()
        if name != "README"
    }


def _required(path, variable):
    if not path.exists():
        raise AnsibleActionFail(f"{variable}: there is no {path} on this machine")
    return path


def _running_kit():
    found = importlib.util.find_spec("mixtral_run")
    if found is not None and found.submodule_search_locations:
        return Path(next(iter(found.submodule_search_locations)))
    # The collection contains the package.
    beside = Path(__file__).resolve().parents[2] / "mixtral_run"
    if not (beside / "__init__.py").is_file():
        raise AnsibleActionFail("Ansible runs without the package mixtral_run beside it: set image_kit_folder")
    return beside


def _digest(context):
    digest = hashlib.sha256()
    for name, content in sorted(context.items()):
        # The name of a wheel states its version and build. Hashing gigabytes of wheels on each run would add nothing.
        reported = content if isinstance(content, bytes) else f"{content.name} {content.stat().st_size}".encode()
        digest.update(f"{name} {len(reported)}\n".encode() + reported)
    return digest.hexdigest()


def _file_digest(path):
    figures = path.stat()
    return hashlib.sha256(f"{path.name} {figures.st_size} {int(figures.st_mtime)}".encode()).hexdigest()


def _write_tar(context, file):
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in sorted(context.items()):
            entry = tarfile.TarInfo(name)
            entry.mode = 0o644
            if isinstance(content, bytes):
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
            else:
                entry.size = content.stat().st_size
                with content.open("rb") as stream:
                    archive.addfile(entry, stream)
    file.flush()
