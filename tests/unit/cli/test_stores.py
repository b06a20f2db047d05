"""Settings with URLs: which take them, what is refused, and what the verb gets in their place."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from mixtral_run.cli import stores
from mixtral_run.config.names.store_names import store_url, url_problem
from mixtral_run.config.verbs.pretrain import PretrainConfig
from mixtral_run.config.verbs.training import FinetuneConfig, UpConfig
from mixtral_run.config.verbs.weights import ExportConfig
from mixtral_run.errors import ConfigError


def config(**values: object) -> FinetuneConfig:
    return FinetuneConfig.from_mapping({"load": "base", "save": "s3://bucket/run", "mock_data": True, **values})


def test_a_url_is_kept_on_its_way_through_json() -> None:
    found = FinetuneConfig.from_json(config(load="s3://bucket/a/base").check().to_json())
    assert stores.urls_of(found) == {"load": ["s3://bucket/a/base"], "save": ["s3://bucket/run"]}
    export = ExportConfig.from_mapping({"adapter": ["s3://b/x/run:0.5", "here:0.5"], "output_path": "out"}).check()
    assert stores.urls_of(export) == {"adapter": ["s3://b/x/run"]}
    assert stores.urls_of(config(save="run", load="C:/x")) == {}
    assert store_url("mistralai/Mixtral-8x7B-v0.1") is None


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("s3://key:SECRETWORD@bucket/run", "an @"),
        ("https://host/run", "https://"),
        ("s3://bucket", "no folder"),
        ("s3://bucket/../x", "no folder"),
        ("s3://bucket/a b\tc", "other characters"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_repeating_it(url: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        config(save=url).check()
    assert found in str(error.value) and "--save" in str(error.value) and "SECRETWORD" not in str(error.value)
    assert url_problem("s3://bucket/a-b_c/d.e=1") is None


def test_settings_that_take_no_url_say_so() -> None:
    with pytest.raises(ConfigError, match="--metrics-file: expected a path; found a URL"):
        PretrainConfig.from_mapping({"load": "b", "mock_data": True, "metrics_file": "s3://bucket/m"}).check()
    with pytest.raises(ConfigError, match="--save: expected a path; found a URL"):
        UpConfig.from_mapping({"mock_data": True, "save": "s3://bucket/run"}).check()


def test_several_hosts_need_a_folder_that_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.delenv("MIXTRAL_RUN_STORE_CACHE", raising=False)
    with pytest.raises(ConfigError, match="MIXTRAL_RUN_STORE_CACHE"):
        stores.run_with_stores(lambda _: None, config())


def test_the_first_of_several_processes_shows_itself_before_anything_takes_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("MIXTRAL_RUN_STORE_CACHE", str(tmp_path))
    found: list[list[Path]] = []

    def stop(*_: object) -> None:
        found.append(list(tmp_path.rglob("begun-*")))
        raise ConfigError("Stop.")

    monkeypatch.setattr(stores, "_check_other_inputs", stop)
    with pytest.raises(ConfigError, match="Stop"):
        stores.run_with_stores(lambda _: None, config())
    assert len(found[0]) == 1 and not list(tmp_path.rglob("begun-*"))


def test_other_inputs_are_looked_at_before_a_copy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        stores.run_with_stores(lambda _: None, config(init_adapter=str(tmp_path / "nowhere")))


def test_the_time_after_a_signal_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM while the rest is copied: the grace time begins; a second signal ends it."""
    monkeypatch.setattr(stores, "_SAME_SECONDS", 0.0)
    seen: list[float | None] = []

    def finish(seconds: Callable[[], float | None]) -> None:
        seen.append(seconds())
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            seen.append(seconds())

    assert threading.current_thread() is threading.main_thread()
    stores._finish(finish, stopped=False)
    assert seen[0] is None and seen[1] is not None and 200 < seen[1] <= stores.GRACE_SECONDS and seen[2] == 0.0
    seen.clear()
    stores._finish(finish, stopped=True)
    assert seen[0] is not None and seen[1] == 0.0
