"""Where the HF model is: a directory, or a name on the hub, downloaded into HF_HOME.

The token comes from HF_TOKEN or the file that `hf auth login` wrote; it is never taken as a flag and never printed.
"""

from __future__ import annotations

import re
from pathlib import Path

from mixtral_run.errors import WeightsError
from mixtral_run.model.architecture import MixtralArchitecture
from mixtral_run.report import Report
from mixtral_run.weights.sidecars import TOKENIZER_FILES
from mixtral_run.weights.staging import GIB, free_bytes

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The released repositories hold the weights a second time, as consolidated.*.pt: 93 GB that nobody here reads.
_WANTED = ["model*.safetensors", "model.safetensors.index.json", *TOKENIZER_FILES]


def resolve(hf_model_path: str, report: Report) -> Path:
    """The directory of the model, after downloading it where `hf_model_path` is a hub name.

    A download that was interrupted goes on with the files that are not there yet. Raises WeightsError: not there,
    gated, no access, offline, no space for it.
    """
    directory = Path(hf_model_path).expanduser()
    if directory.is_dir():
        return directory
    if not _HUB_NAME.fullmatch(hf_model_path):
        raise WeightsError(
            "The HF model does not exist.",
            where=hf_model_path,
            expected="a directory, or a name on the hub such as mistralai/Mixtral-8x7B-Instruct-v0.1",
        )
    return _download(hf_model_path, report)


def _download(name: str, report: Report) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    cache = Path(constants.HF_HUB_CACHE)
    try:
        _check_download(name, cache, report)
        return Path(snapshot_download(name, allow_patterns=_WANTED))
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
            found=_token_state(),
            next_command="check the name; for a private model: hf auth login, or HF_TOKEN in the environment",
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


def _check_download(name: str, cache: Path, report: Report) -> None:
    """Say how much there is to download. Raises WeightsError when it has no weights, is no Mixtral or does not fit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import DryRunError

    try:
        files = snapshot_download(name, allow_patterns=_WANTED, dry_run=True)
    except DryRunError:
        # Not to be reached: the download itself says why, or finds everything in the cache.
        return
    if not any(file.filename.endswith(".safetensors") for file in files):
        raise WeightsError(
            "The hub's repository holds no safetensors weights.", where=name, expected="model*.safetensors"
        )
    # 93 GB of another model would be for nothing.
    MixtralArchitecture.from_hf_directory(Path(snapshot_download(name, allow_patterns="config.json")))
    remaining = sum(file.file_size or 0 for file in files if file.will_download)
    free = free_bytes(cache)
    if remaining > free:
        raise WeightsError(
            "There is no space for the download.",
            where=str(cache),
            expected=f"{remaining / GIB:,.2f} GiB free ({remaining:,} bytes)",
            found=f"{free / GIB:,.2f} GiB ({free:,} bytes)",
            next_command="HF_HOME=/a/larger/disk mixtral-run …",
        )
    if remaining:
        report.say(f"  downloading {remaining:,} bytes of {name} into {cache}")


def _token_state() -> str:
    from huggingface_hub import get_token

    return "a token was sent" if get_token() else "no token (neither HF_TOKEN nor a token file under HF_HOME)"


def _unreachable(name: str, endpoint: str, cache: Path, error: BaseException) -> WeightsError:
    return WeightsError(
        "The hub cannot be reached, and the model is not whole in the cache.",
        where=f"{endpoint}/{name}",
        expected=f"a connection, or the model under {cache}",
        found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
        next_command="check HF_ENDPOINT, HTTPS_PROXY and HF_HUB_OFFLINE; or give --hf-model-path a directory",
    )
