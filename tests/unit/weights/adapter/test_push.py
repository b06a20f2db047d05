"""Uploads: what the hub is asked for, and what it is never sent. The hub is a stand-in that notes its calls."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixtral_run.errors import ConfigError, WeightsError
from mixtral_run.terminal.report import Report
from mixtral_run.weights.adapter.push import Repository


class Hub:
    """Stand-in for HfApi. private: of the repository; None if there is none."""

    def __init__(self, private: bool | None = True, error: Exception | None = None) -> None:
        self.private, self.error = private, error
        self.calls: list[tuple[str, Any]] = []
        self.commit: Any = SimpleNamespace(commit_url="https://hub/commit")

    def __call__(self, token: str | None) -> Hub:
        self.calls.append(("token", token))
        return self

    def whoami(self) -> None:
        if self.error:
            raise self.error

    def repo_info(self, name: str) -> Any:
        if self.private is None:
            import httpx
            from huggingface_hub.errors import RepositoryNotFoundError

            raise RepositoryNotFoundError(
                "none", response=httpx.Response(404, request=httpx.Request("GET", "http://h"))
            )
        return SimpleNamespace(private=self.private)

    def create_repo(self, name: str, **settings: Any) -> None:
        self.calls.append(("create", (name, settings)))

    def upload_folder(self, **settings: Any) -> Any:
        self.calls.append(("upload", settings))
        if self.error:
            raise self.error
        return self.commit


def hub(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Hub:
    stand_in = Hub(**settings)
    monkeypatch.setattr("huggingface_hub.HfApi", stand_in)
    return stand_in


@pytest.mark.parametrize(("public", "private"), [(False, True), (True, False), (True, True), (False, None)])
def test_one_commit_without_the_record(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    public: bool,
    private: bool | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    api = hub(monkeypatch, private=private)
    (tmp_path / "token").write_text("\ufeff hf_x \n", encoding="utf-8")
    repository = Repository("owner/name", tmp_path / "token", public=public)
    assert repository.push(tmp_path, Report()) == "https://hub/commit"
    assert api.calls == [
        ("token", "hf_x"),
        ("create", ("owner/name", {"private": not public, "exist_ok": True})),
        ("upload", {"folder_path": str(tmp_path), "repo_id": "owner/name", "ignore_patterns": ["mixtral_run.json"],
                    "commit_message": "Adapter exported by mixtral-run"}),
    ]  # fmt: skip
    output = "".join(capsys.readouterr())
    assert f"uploading {tmp_path} to owner/name ({'public' if public else 'private'})" in output
    assert "hf_x" not in output
    api.commit = None
    assert repository.push(tmp_path, Report.silent()) == "https://huggingface.co/owner/name"


def test_a_public_repository_is_refused_before_anything_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, private=False)
    with pytest.raises(ConfigError, match="everybody can see it") as caught:
        Repository("owner/name", None, public=False)
    assert (caught.value.where, caught.value.found) == ("owner/name", "a public one")


def test_the_hubs_own_words_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    api = hub(monkeypatch, error=OSError("x" * 400 + "\nmore"))
    with pytest.raises(ConfigError, match="cannot be used") as caught:
        Repository("owner/name", None, public=False)
    assert (caught.value.found, caught.value.where) == ("x" * 300, "--push owner/name")
    assert api.calls == [("token", None)]
    api.error = None
    repository = Repository("owner/name", None, public=False)
    api.error = ValueError()
    with pytest.raises(WeightsError, match="export is complete") as failed:
        repository.push(tmp_path, Report.silent())
    assert failed.value.found == "ValueError"
    assert failed.value.next_command == f"hf upload owner/name {tmp_path} --exclude mixtral_run.json"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "0 words"),
        (b"a b", "2 words"),
        (b"\xff\xfe", "other than text in UTF-8"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_without_one_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None, found: str
) -> None:
    api = hub(monkeypatch)
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Repository("owner/name", tmp_path / "token", public=False)
    assert (caught.value.found, caught.value.where) == (found, f"--hf-token-file {tmp_path / 'token'}")
    assert api.calls == []
