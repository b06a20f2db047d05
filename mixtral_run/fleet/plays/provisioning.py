"""Location of playbooks, roles and plugins: in the checkout, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

from mixtral_run.errors import MixtralRunError

PACKAGED = "provisioning"


def provisioning_folder() -> Path:
    """Return the folder with ansible.cfg, playbooks/ and roles/. Raises MixtralRunError if there is none."""
    package = Path(__file__).resolve().parents[2]
    candidates = (package / PACKAGED, package.parent)
    for folder in candidates:
        if (folder / "playbooks").is_dir() and (folder / "ansible.cfg").is_file():
            return folder
    raise MixtralRunError(
        "The playbooks are missing.",
        where=", ".join(map(str, candidates)),
        expected="ansible.cfg, playbooks/ and roles/",
        found="none",
        next_command="pip install --force-reinstall mixtral-run",
    )


def collection_folder() -> Path:
    """Return the folder of the collection, with plugins/. Raises MixtralRunError as `provisioning_folder` does."""
    return provisioning_folder() / "collections/ansible_collections/mixtral_run/hosts"


def playbook(name: str) -> Path:
    """Return the file of a playbook. Raises MixtralRunError if it is missing."""
    path = provisioning_folder() / "playbooks" / f"{name}.yml"
    if not path.is_file():
        raise MixtralRunError("A playbook is missing.", where=str(path))
    return path


def role_names() -> tuple[str, ...]:
    """Return the names of the roles, which are also the tags of `bootstrap`."""
    return tuple(sorted(folder.name for folder in (provisioning_folder() / "roles").iterdir() if folder.is_dir()))
