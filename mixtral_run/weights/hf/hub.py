"""Find the HF model: a directory, or a name on the hub, which is downloaded into HF_HOME.

The token comes from HF_TOKEN or the file that `hf auth login` wrote; it is never taken as a flag and never printed.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mixtral_run.config.fields import Config
from mixtral_run.config.home_folder import expanded
from mixtral_run.config.names.hub_names import HF_MODEL_SETTINGS, hub_name_and_revision, may_be_hub_name
from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import EXAMPLE_NAME, MixtralArchitecture
from mixtral_run.terminal.report import Report, repeating
from mixtral_run.weights.hf.tokenizer_files import MORE_TEMPLATES, TOKENIZER_FILES
from mixtral_run.weights.io.atomic_folder import GIB, free_bytes
from mixtral_run.weights.io.files import how_to_restore

ConfigT = TypeVar("ConfigT", bound=Config)

# The released repositories hold the weights a second time, as consolidated.*.pt: 93 GB that the kit never reads.
_DESCRIPTION = (*TOKENIZER_FILES, f"{MORE_TEMPLATES}/*.jinja")
_WANTED = ("model*.safetensors", "model.safetensors.index.json", *_DESCRIPTION)
# Where there are no safetensors files.
_WANTED_BINS = ("pytorch_model*.bin", "pytorch_model.bin.index.json", *_DESCRIPTION)
_WEIGHTS = (".safetensors", ".bin")
_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class HubModel:
    """A model on the hub, as known before its weights are downloaded. Sizes are those of the files that are needed."""

    name: str
    architecture: MixtralArchitecture
    num_bytes: int
    missing_bytes: int
    cache: Path
    patterns: tuple[str, ...] = _WANTED
    """The files that are needed."""

    @property
    def dtype(self) -> str:
        """Return the dtype that follows from the size of the weights; fp16 counts as bf16."""
        return "float32" if self.num_bytes >= 4 * self.architecture.num_parameters else "bfloat16"


BeforeDownload = Callable[[HubModel], object]
"""Called before the download; raises the problems that can be found without the weights."""


def is_on_hub(path: Path | str) -> bool:
    """Return True if a path is a hub name: it has the form of one, and no local folder has, or had, that path."""
    folder = expanded(path)
    return may_be_hub_name(str(path)) and not folder.exists() and how_to_restore(folder) is None


def with_models_here(config: ConfigT, report: Report, check: BeforeDownload | None = None) -> ConfigT:
    """Return the config with hub names replaced by the models' directories. Raises as `resolve` does.

    Other paths stay as they are: whatever reads them reports their problems.
    """
    named = {name: getattr(config, name, None) for name in HF_MODEL_SETTINGS}
    found = {
        name: resolve(str(value), report, check)
        for name, value in named.items()
        if value is not None and is_on_hub(value)
    }
    return dataclasses.replace(config, **found)


def resolve(hf_model_path: str, report: Report, check: BeforeDownload | None = None) -> Path:
    """Return the model's directory, after downloading it if `hf_model_path` is a hub name, NAME or NAME@REVISION.

    An interrupted download continues with the files that are missing; a complete one needs no connection. `check` is
    called before weights are downloaded. Raises WeightsError if the model does not exist, is gated, cannot be accessed
    or reached, or does not fit on the disk.
    """
    directory = _local_directory(hf_model_path)
    if directory is not None:
        return directory
    hub_model = ask(hf_model_path)
    if hub_model is not None:
        if check is not None:
            check(hub_model)
        _check_space(hub_model)
    return _download(hf_model_path, _WANTED if hub_model is None else hub_model.patterns, report, hub_model)


def resolve_description(hf_model_path: str, report: Report) -> Path:
    """Return a directory with the model's config.json and tokenizer, without weights; otherwise as `resolve`."""
    return _local_directory(hf_model_path) or _download(hf_model_path, _DESCRIPTION, report)


def _local_directory(hf_model_path: str) -> Path | None:
    """Return a local directory, or None for a hub name. Raises WeightsError for anything else."""
    directory = expanded(hf_model_path)
    try:
        if directory.is_dir():
            return directory
        if is_on_hub(hf_model_path):
            return None
        is_file = directory.exists()
        found = "a file" if is_file else "nothing of that name"
        next_command = how_to_restore(directory) or f"ls {directory.parent}"
    except OSError as error:
        is_file, found, next_command = False, str(error.strerror), f"ls -ld {shlex.quote(str(directory.parent))}"
    raise WeightsError(
        "The HF model is not a directory." if is_file else "The HF model does not exist.",
        where=hf_model_path,
        expected=f"a directory, or a name on the hub such as {EXAMPLE_NAME}",
        found=found,
        next_command=next_command,
    )


def ask(hf_model_path: str) -> HubModel | None:
    """Ask the hub for a model's sizes; only config.json is downloaded. Return None if the hub cannot be reached.

    Raises WeightsError if the model has no weights or is not a Mixtral, before 93 GB are downloaded for nothing.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    name, revision = hub_name_and_revision(hf_model_path)
    with _as_weights_errors(hf_model_path):
        for patterns in (_WANTED, _WANTED_BINS):
            try:
                files = snapshot_download(name, revision=revision, allow_patterns=list(patterns), dry_run=True)
            except DryRunError:
                # The hub cannot be reached: the download itself reports why, or finds everything in the cache.
                return None
            if any(file.filename.endswith(_WEIGHTS) for file in files):
                break
        folder = Path(snapshot_download(name, revision=revision, allow_patterns="config.json"))
        # Quantized weights have names of their own: config.json says better than names why they cannot be read.
        architecture = MixtralArchitecture.from_hf_directory(folder)
        if not any(file.filename.endswith(_WEIGHTS) for file in files):
            raise WeightsError(
                "The hub's repository holds no weights that can be read.",
                where=hf_model_path,
                expected="model*.safetensors or pytorch_model*.bin",
                next_command="give the name of the model's own repository, with weights in transformers' format",
            )
    return HubModel(
        name=hf_model_path,
        architecture=architecture,
        num_bytes=sum(file.file_size or 0 for file in files if file.filename.endswith(_WEIGHTS)),
        missing_bytes=sum(file.file_size or 0 for file in files if file.will_download),
        cache=Path(constants.HF_HUB_CACHE),
        patterns=patterns,
    )


def hub_name_of(directory: Path) -> str | None:
    """Return NAME@COMMIT if the directory is a snapshot in the hub's cache, else None."""
    repository = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return f"{repository.removeprefix('models--').replace('--', '/')}@{directory.name}"


def _check_space(hub_model: HubModel) -> None:
    free = free_bytes(hub_model.cache)
    if hub_model.missing_bytes > free:
        raise WeightsError(
            "There is no space for the download.",
            where=str(hub_model.cache),
            expected=f"{hub_model.missing_bytes / GIB:,.2f} GiB free ({hub_model.missing_bytes:,} bytes)",
            found=f"{free / GIB:,.2f} GiB ({free:,} bytes)",
            next_command="HF_HOME=/a/larger/disk mixtral-run …",
        )


def _download(hf_model_path: str, patterns: tuple[str, ...], report: Report, hub_model: HubModel | None = None) -> Path:
    from huggingface_hub import snapshot_download

    name, revision = hub_name_and_revision(hf_model_path)
    with _as_weights_errors(hf_model_path), _watched(hub_model, report):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _watched(hub_model: HubModel | None, report: Report) -> Iterator[None]:
    """Show the progress of a download by the size of the cache; the client's own bars show one file each."""
    if hub_model is None or not hub_model.missing_bytes:
        yield
        return
    report.say(f"  downloading {hub_model.missing_bytes:,} bytes of {hub_model.name} into {hub_model.cache}")
    blobs = hub_model.cache / f"models--{hub_name_and_revision(hub_model.name)[0].replace('/', '--')}" / "blobs"
    before, done, total = _size(blobs), 0, hub_model.missing_bytes
    with report.progress(total, "downloaded") as progress:

        def reach(now: int) -> None:
            nonlocal done
            if now > done:
                progress.advance(now - done)
                done = now

        # The disk's blocks are a little more than the bytes, and the last look is a moment before the end.
        with repeating(_POLL_SECONDS, lambda: reach(min(_size(blobs) - before, total))):
            yield
        reach(total)


def _size(folder: Path) -> int:
    """Return the bytes that a folder's files take on the disk, while they appear, vanish and are renamed."""
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_blocks * 512
        except OSError:
            continue
    return total


@contextmanager
def _as_weights_errors(name: str) -> Iterator[None]:
    """Translate the errors of the hub's client into WeightsError."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    cache = Path(constants.HF_HUB_CACHE)
    try:
        yield
    except GatedRepoError as error:
        raise WeightsError(
            "The model's owner asks for your consent before it can be downloaded.",
            where=f"{constants.ENDPOINT}/{name}",
            expected="its terms accepted with your account, and that account's token",
            found=_token_state(),
            next_command="accept the terms on that page; then hf auth login, or HF_TOKEN in the environment",
        ) from error
    except RepositoryNotFoundError as error:
        raise WeightsError(
            "The hub has no such model, or your account may not see it.",
            where=f"{constants.ENDPOINT}/{name}",
            found=f"no folder of that name here; {_token_state()}",
            next_command="check the name; for a private model: hf auth login, or HF_TOKEN in the environment",
        ) from error
    except RevisionNotFoundError as error:
        raise WeightsError(
            "The hub's model has no such revision.",
            where=f"{constants.ENDPOINT}/{name}",
            expected="NAME@REVISION with a branch, tag or commit of the model",
            found=hub_name_and_revision(name)[1] or "main",
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise _unreachable(name, constants.ENDPOINT, cache, error) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            raise WeightsError(
                "The hub refused the token.",
                where=f"{constants.ENDPOINT}/{name}",
                found=f"{_token_state()}; HTTP {status}",
                next_command="hf auth login, or a valid HF_TOKEN in the environment",
            ) from error
        raise WeightsError(
            "The hub did not deliver the model.",
            where=f"{constants.ENDPOINT}/{name}",
            found=f"HTTP {status}",
            next_command="the same command again; what is downloaded stays",
        ) from error
    except (OSError, RuntimeError) as error:
        raise _unreachable(name, constants.ENDPOINT, cache, error) from error
    except Exception as error:
        # The hub's client raises its HTTP library's own errors for connections that fail; they have no common base
        # with OSError, and naming that library here would tie the kit to it.
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise _unreachable(name, constants.ENDPOINT, cache, error) from error
        raise


def _token_state() -> str:
    from huggingface_hub import get_token

    return "a token was sent" if get_token() else "no token (neither HF_TOKEN nor a token file under HF_HOME)"


def _unreachable(name: str, endpoint: str, cache: Path, error: BaseException) -> WeightsError:
    return WeightsError(
        "The hub cannot be reached, and the model is not complete in the cache.",
        where=f"{endpoint}/{name}",
        expected=f"a connection, or the model under {cache}, or a folder of that name here",
        found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
        next_command="check HF_ENDPOINT, HTTPS_PROXY and HF_HUB_OFFLINE; or give the model's directory",
    )
