"""Passwords of Ansible Vault: where Ansible finds them, and what to do without them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mixtral_run.config.home_folder import expanded

PASSWORD_FILE, IDENTITIES = "ANSIBLE_VAULT_PASSWORD_FILE", "ANSIBLE_VAULT_IDENTITY_LIST"
_WITHOUT_PASSWORD = re.compile(
    r"no vault secrets|vault password file .* was not found|vault password file .* not found|decryption failed",
    re.IGNORECASE,
)


def vault_settings() -> dict[str, str]:
    """Return the user's settings of vault passwords with absolute paths: plays run in another folder."""
    found = {}
    if file := os.environ.get(PASSWORD_FILE):
        found[PASSWORD_FILE] = str(expanded(file).absolute())
    if identities := os.environ.get(IDENTITIES):
        found[IDENTITIES] = ",".join(map(_absolute, identities.split(",")))
    return found


def _absolute(identity: str) -> str:
    """Return `label@source`, or a source alone. A source that is no file here, such as `prompt`, stays as it is."""
    label, at, source = identity.strip().rpartition("@")
    file: Path = expanded(source)
    return f"{label}{at}{file.absolute()}" if file.is_file() else identity.strip()


def next_for_vault(error: str) -> str | None:
    """Return what to do about an error of Ansible that comes from a missing or wrong vault password, or None."""
    if not _WITHOUT_PASSWORD.search(error):
        return None
    return f"{PASSWORD_FILE}=FILE, with the password in FILE, before the same command"
