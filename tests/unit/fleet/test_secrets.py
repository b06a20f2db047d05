"""A file with a token or keys is looked at before any host is: what the role cannot use is refused, and not shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from mixtral_run.fleet.secrets import keys_problem, token_problem


@pytest.mark.parametrize(
    "content",
    [b"hf_abc", b"hf_abc\n", b"\xef\xbb\xbfhf_abc\r\n", b'"hf_abc"\n', b"  'hf_abc'", b"hf!abc~"],
    ids=["bare", "newline", "byte order mark", "quotes", "single quotes", "the first and the last sign"],
)
def test_a_token_that_the_role_can_clean_is_no_problem(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    assert token_problem(tmp_path / "token") is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found nothing"),
        (b"\xef\xbb\xbf\n", "found nothing"),
        (b"hf_abc hf_def", "found 2 words"),
        (b"HF_TOKEN=hf_abc", "an equals sign"),
        ("hf_abc\u200b".encode(), "other than ASCII"),
        (b"hf\x01_abc", "other than ASCII"),
        (b"hf_abc\x7f", "other than ASCII"),
        ("hf_abc".encode("utf-16"), "UTF-16"),
    ],
)
def test_anything_else_is_refused_without_showing_it(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "token").write_bytes(content)
    problem = token_problem(tmp_path / "token")
    assert problem is not None and words in problem and "abc" not in problem


def test_a_file_that_is_not_there_is_a_problem(tmp_path: Path) -> None:
    assert token_problem(tmp_path / "token") == "No such file or directory"


KEYS = "[default]\naws_access_key_id = AKIDNOBODY\naws_secret_access_key = neverShown\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (KEYS.encode(), None),
        (b"\xef\xbb\xbf" + KEYS.replace("\n", "\r\n").encode(), None),
        (KEYS.replace("[default]", "[other]").encode(), "no aws_access_key_id and no aws_secret_access_key"),
        (KEYS.replace("AKIDNOBODY", "").encode(), "found no aws_access_key_id"),
        (KEYS.partition("\n")[2].encode(), "other lines than NAME = VALUE"),
        (b"AWS_SECRET_ACCESS_KEY=neverShown", "other lines than NAME = VALUE"),
        (KEYS.encode("utf-16"), "UTF-16"),
        (None, "No such file"),
    ],
)
def test_keys_of_a_store_are_in_the_form_that_its_client_reads(
    tmp_path: Path, content: bytes | None, words: str | None
) -> None:
    if content is not None:
        (tmp_path / "keys").write_bytes(content)
    problem = keys_problem(tmp_path / "keys")
    assert (problem is None) is (words is None)
    assert problem is None or (words is not None and words in problem and "neverShown" not in problem)
