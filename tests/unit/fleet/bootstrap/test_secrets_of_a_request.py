"""Secrets of a bootstrap: by path to the role that writes them, and never without that role in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mixtral_run.errors import ConfigError
from mixtral_run.fleet.bootstrap.bootstrap import BootstrapRequest, _play, bootstrap
from mixtral_run.fleet.bootstrap.host_lock import Held
from mixtral_run.fleet.ssh.connection import Ssh


@pytest.fixture
def request_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BootstrapRequest:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    Path("token").write_text("hf_neverShown")
    Path("keys").write_text("[default]\naws_access_key_id = A\naws_secret_access_key = neverShown\n")
    return BootstrapRequest(hosts=("gpu-01",), hf_token_file=Path("token"), store_keys_file=Path("keys"))


def test_the_role_gets_the_paths_and_so_does_a_retry_from_another_folder(
    request_of_all: BootstrapRequest, tmp_path: Path
) -> None:
    variables = _play(request_of_all, (), Ssh(), Held()).variables
    expected = {"hf_cache_token_file": str(tmp_path / "token"), "hf_cache_store_keys_file": str(tmp_path / "keys")}
    assert {name: variables.get(name) for name in expected} == expected
    record = json.dumps(request_of_all.to_record())
    assert "neverShown" not in record + str(variables)
    again = BootstrapRequest.from_record(json.loads(record))
    assert (again.hf_token_file, again.store_keys_file) == (tmp_path / "token", tmp_path / "keys")
    # The other roles do not need them, and a file that is gone meanwhile must not stop them.
    other = again.again_with({"tags": ("docker",)})
    assert (other.hf_token_file, other.store_keys_file) == (None, None)
    assert again.again_with({"tags": ("docker", "hf_cache")}).store_keys_file == tmp_path / "keys"


def test_all_that_is_wrong_is_refused_before_a_host_is_asked(request_of_all: BootstrapRequest) -> None:
    Path("keys").write_text("aws_secret_access_key = neverShown")
    request = BootstrapRequest(
        hosts=("gpu-01",), tags=("docker",), hf_token_file=Path("token"), store_keys_file=Path("keys")
    )
    with pytest.raises(ConfigError) as refused:
        bootstrap(request)
    assert [line.split(": expected ")[0] for line in refused.value.problems] == [
        "--hf-token-file", "--store-keys-file keys", "--store-keys-file"
    ]  # fmt: skip
    assert "hf_cache among --tags" in refused.value.problems[0] and "neverShown" not in str(refused.value)
