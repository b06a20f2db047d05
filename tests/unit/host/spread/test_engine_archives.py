"""Archives that engines wrote, in each of Docker's formats: they hold the IDs that the engines gave to the image."""

from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.spread.image_ids import ids_in


@pytest.mark.parametrize("engine", ["docker-20.10", "docker-26.1", "docker-26.1-containerd"])
def test_the_ids_are_those_that_the_engines_gave_to_the_image(engine: str) -> None:
    """Each engine saved the same image by its ID. The IDs here are those of `docker image inspect`."""
    config = "sha256:545cc956c5db196bc9336556190f5c8386e6e9457d1bae15c328e078929a2370"
    manifest = "sha256:aafb26c3e7ac3d9fbd1b298054b2e5a3183a01dba43b3cb5a307121a410301f3"
    found = ids_in(Path(__file__).parent / "archives" / f"{engine}.tar")
    assert found == ([config] if engine == "docker-20.10" else [config, manifest])
