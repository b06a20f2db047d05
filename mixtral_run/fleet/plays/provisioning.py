"""Where playbooks, roles and plugins lie: in the checkout, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

from mixtral_run.errors import MixtralRunError

PACKAGED = "provisioning"


def provisioning_folder() -> Path:
    """The folder with ansible.cfg, playbooks/, roles/ and plugins/. Raises MixtralRunError where there is none."""
    package = Path(__file__).resolve().parents[2]
    candidates = (package / PACKAGED, package.parent)
    for folder in candidates:
        if (folder / "playbooks").is_dir() and (folder / "ansible.cfg").is_file():
            return folder
    raise MixtralRunError(
        "The playbooks are not where this program looks for them.",
        where=", ".join(map(str, candidates)),
        expected="ansible.cfg, playbooks/ and roles/",
        found="none",
        next_command="install the wheel again: pip install --force-reinstall mixtral-run",
    )


def playbook(name: str) -> Path:
    """The file of a playbook. Raises MixtralRunError where it is missing."""
    path = provisioning_folder() / "playbooks" / f"{name}.yml"
    if not path.is_file():
        raise MixtralRunError("A playbook is missing.", where=str(path))
    return path


def role_names() -> tuple[str, ...]:
    """The roles, by which a part of `bootstrap` is named."""
    return tuple(sorted(folder.name for folder in (provisioning_folder() / "roles").iterdir() if folder.is_dir()))
