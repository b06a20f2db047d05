"""What the errors of an object store mean: which of them pass by themselves, and the words for each.

The clients of the stores raise errors of many libraries. fsspec's own turn the answers of a store into OSErrors.
"""

from __future__ import annotations

import errno
import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from mixtral_run.config.names.store_names import SCHEMES
from mixtral_run.errors import ConfigError, HostError, MixtralRunError, TrainingError, WeightsError

ResultT = TypeVar("ResultT")

REFUSED, MISSING, FULL, WRONG, PASSING = "refused", "missing", "full", "wrong", "passing"
PAUSES = (1.0, 2.0, 4.0, 8.0)
"""Seconds before each repetition of a call that failed for a reason that may pass."""
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")
_CLIENTS = ("aiobotocore", "aiohttp", "asyncio", "azure", "botocore", "concurrent", "fsspec", "gcsfs", "google")
_FULL_TEXT = re.compile(r"StorageFull|QuotaExceeded|InsufficientStorage|QuotaExhausted|\b507\b", re.IGNORECASE)
_WRONG_NUMBERS = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG)
_SHOWN = 300


class LocalFileError(Exception):
    """A file of this machine could not be read or written while it was copied. The cause is an OSError."""


def kind_of(error: BaseException) -> str | None:
    """Return the kind of a store's error; None for an error that no store causes."""
    chain = list(_chain(error))
    if any(_FULL_TEXT.search(str(each)) for each in chain):
        return FULL
    if any(isinstance(each, PermissionError) or type(each).__name__ in _NO_KEYS for each in chain):
        return REFUSED
    if isinstance(error, FileNotFoundError):
        return MISSING
    if isinstance(error, OSError):
        return FULL if error.errno == errno.ENOSPC else WRONG if error.errno in _WRONG_NUMBERS else PASSING
    return PASSING if type(error).__module__.partition(".")[0] in _CLIENTS else None


def repeated(call: Callable[[], ResultT]) -> ResultT:
    """Return what `call` returns; repeat it if the store fails for a reason that may pass."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            if kind_of(error) != PASSING:
                raise
        time.sleep(pause)
    return call()


def store_error(error: BaseException, url: str, what: str, *, in_a_run: bool = False) -> MixtralRunError:
    """Return the error for the user. what: what could not be done, as a sentence.

    in_a_run: the work before was done and is kept. A store that cannot be reached then is a TrainingError, which a
    restart can cure.
    """
    if isinstance(error, MixtralRunError):
        return error
    scheme = url.partition("://")[0]
    kind = kind_of(error)
    found = (" ".join(str(error).split()) or type(error).__name__)[:_SHOWN]
    if kind == REFUSED:
        return ConfigError(
            f"{what} The store refuses access.",
            where=url,
            expected=_KEYS.get(scheme, "credentials that may read, and write where the command writes"),
            found=found,
            next_command=_SEND_KEYS if scheme == "s3" else None,
        )
    if kind == MISSING:
        return ConfigError(
            f"{what} The store has no such bucket or folder.",
            where=url,
            found=found,
            next_command=_LIST.get(scheme, "list the bucket with the store's own tool").format(url=url),
        )
    if kind == FULL:
        return (TrainingError if in_a_run else HostError)(
            f"{what} The store has no space, or a quota is reached.", where=url, found=found
        )
    if kind == WRONG:
        return ConfigError(f"{what} The store does not accept the request.", where=url, found=found)
    if kind == PASSING:
        return (TrainingError if in_a_run else HostError)(
            f"{what} The store cannot be reached, or does not answer.",
            where=url,
            expected="a store that answers" + (", at AWS_ENDPOINT_URL if it is not Amazon's" if scheme == "s3" else ""),
            found=found,
            next_command="the same command again; what is copied stays",
        )
    if isinstance(error, LocalFileError):
        return WeightsError(f"{what} A file of this machine cannot be used.", where=url, found=found)
    raise error


def needs_package(scheme: str, error: ImportError) -> ConfigError:
    """Return the error for a store whose client is not installed."""
    package = SCHEMES.get(scheme, "fsspec")
    extra = "'mixtral-run[stores]'" if scheme == "s3" else package
    return ConfigError(
        f"{scheme}:// needs the package {package}, which is not installed.",
        found=str(error),
        next_command=f"pip install {extra}",
    )


_KEYS = {
    "s3": "keys that may read, and write where the command writes: in HF_HOME/store-credentials, in ~/.aws, or as "
    "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
}
_SEND_KEYS = (
    "correct the keys; for jobs on hosts: mixtral-run bootstrap HOST --tags hf_cache --store-keys-file FILE; for "
    "--launcher kubernetes: --store-secret NAME"
)
_LIST = {"s3": "aws s3 ls {url}/", "gs": "gcloud storage ls {url}/"}


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
