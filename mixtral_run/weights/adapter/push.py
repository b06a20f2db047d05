"""Upload an exported directory to a repository on the hub, private unless it is asked otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.manifest.manifest import MANIFEST_NAME

NOT_PUBLISHED = [MANIFEST_NAME]
"""The record of an export names folders of this machine."""


class Repository:
    """A repository on the hub. Its owner and the token are checked at the start, before anything is exported.

    Args:
        name: OWNER/NAME.
        token_file: file that holds the token; None for the login of this user.
        public: True if everybody may see it.

    Raises:
        ConfigError: the token does not work, or the repository is there and public although it shall be private.
    """

    def __init__(self, name: str, token_file: Path | None, *, public: bool) -> None:
        from huggingface_hub import HfApi

        self.name, self._public = name, public
        self._api = HfApi(token=_token(token_file))
        self._check()

    def _check(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            self._api.whoami()
            is_private = self._api.repo_info(self.name).private
        except RepositoryNotFoundError:
            return
        except Exception as error:
            # huggingface_hub passes on the exceptions of its HTTP library.
            raise self._refused("The hub cannot be used.", error) from error
        if not is_private and not self._public:
            raise ConfigError(
                "The repository is there, and everybody can see it.",
                where=self.name,
                expected="a private repository, or a new name",
                found="a public one",
                next_command="another --push NAME, or --push-public",
            )

    def push(self, folder: Path, report: Report) -> str:
        """Upload the folder as one commit, and return its URL. Raises WeightsError if the hub refuses."""
        report.say(f"  uploading {folder} to {self.name} ({'public' if self._public else 'private'})")
        try:
            self._api.create_repo(self.name, private=not self._public, exist_ok=True)
            done: Any = self._api.upload_folder(
                folder_path=str(folder),
                repo_id=self.name,
                ignore_patterns=NOT_PUBLISHED,
                commit_message="Adapter exported by mixtral-run",
            )
        except Exception as error:
            raise WeightsError(
                "The upload failed; the export is complete on this machine.",
                where=str(folder),
                found=_first_line(error),
                next_command=f"hf upload {self.name} {folder} --exclude {MANIFEST_NAME}",
            ) from error
        return str(getattr(done, "commit_url", None) or f"https://huggingface.co/{self.name}")

    def _refused(self, what: str, error: Exception) -> ConfigError:
        return ConfigError(
            what,
            where=f"--push {self.name}",
            expected="a token that may write there",
            found=_first_line(error),
            next_command="hf auth login; or --hf-token-file FILE",
        )


def _token(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        words = file.read_text(encoding="utf-8-sig").split()
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or "other than text in UTF-8"
        raise ConfigError("The token cannot be read.", where=f"--hf-token-file {file}", found=found) from error
    if len(words) != 1:
        raise ConfigError(
            "The file holds no token.",
            where=f"--hf-token-file {file}",
            expected="one word",
            found=f"{len(words)} words",
        )
    return words[0]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:300]
