"""Schema of the JSON object that `remote_status` prints on a host, and its check. The host is not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mixtral_run.fleet.cordon import cordon_of
from mixtral_run.fleet.status.health import health_of
from mixtral_run.fleet.untrusted import one_line

MAX_ITEMS = 10_000
MAX_TEXT = 20_000
MAX_NUMBER = 1e12

TEXT, NUMBER, WHOLE, FLAG, ANYTHING = "text", "a number", "a whole number", "true or false", "anything"
Schema = str | list["Schema"] | dict[str, "Schema"] | tuple["Schema", ...]
"""Form of a value: one of the words above; a list of values of one form; an object with these keys (others are
ignored); or a tuple, which `maybe` creates: the form, or null."""


def maybe(schema: Schema) -> Schema:
    """Return the schema of a value that may be null."""
    return (schema,)


ANSWER: dict[str, Schema] = {
    "os": {"name": TEXT},
    "kernel": TEXT,
    "driver": {"user": maybe(TEXT), "kernel": maybe(TEXT), "error": maybe(TEXT)},
    "gpus": [
        {"index": WHOLE, "name": TEXT, "memory_gib": NUMBER, "temperature_celsius": NUMBER, "ecc_errors": NUMBER},
    ],
    "engine": {
        "version": maybe(TEXT), "error": maybe(TEXT), "cdi_devices": [maybe(TEXT)], "runtimes": [TEXT],
    },
    "fabric_manager": {"nvswitch": FLAG, "active": FLAG, "version": maybe(TEXT)},
    "gpu_remarks": [TEXT],
    "toolkit": maybe(TEXT),
    # A number of GPUs; an older kit lists them.
    "cdi": {"gpus": ANYTHING},
    "image": maybe({"digests": [TEXT], "inputs": maybe(TEXT), "id": TEXT}),
    "swap": [{"size_gib": NUMBER}],
    "memory": {"ram_gib": NUMBER},
    "disks": [{"path": TEXT, "free_gib": NUMBER}],
    "models": [TEXT],
    "checkpoints": [{"path": TEXT}],
    "adapters": [{"path": TEXT, "iteration": WHOLE}],
    "jobs": [{"name": TEXT, "verb": TEXT, "since": TEXT}],
    "identity": {"machine_id": TEXT, "ssh_host_key": TEXT},
    "xid_errors": maybe([TEXT]),
}  # fmt: skip
"""The readings that `status` shows. `_acceptance` checks the record of the acceptance, which a host may lack."""

RDMA: Schema = maybe({"devices": [{"name": TEXT, "rate": TEXT, "link_layer": TEXT}], "gpudirect": maybe(TEXT)})
"""Active InfiniBand and RoCE devices, and how they reach the memory of the GPUs."""


def check_answer(values: Any) -> dict[str, Any]:
    """Return the readings in the JSON values of an answer: the keys of ANSWER, and the records of the host.

    `acceptance` has `report` (an object, {} if there is none), `at` (text) and `identity` (machine-id, SSH host key).
    `unreadable` lists the files and folders that only root can read.
    `cordon` is a Cordon, or None. `health` is a Health, or None without the health watch.

    Raises:
        ValueError: a reading is missing or not in its form. The message names the reading.
    """
    found: dict[str, Any] = _checked(values, ANSWER, "answer")
    records = values.get("records")
    acceptance = _object(records, "records").get("acceptance")
    found["acceptance"] = _acceptance(_object(acceptance, "records.acceptance"))
    # A record that cannot be read is null, and cordons the host as well.
    found["cordon"] = cordon_of(records["cordon"]) if "cordon" in (records or {}) else None
    found["rdma"] = _checked(values.get("rdma"), RDMA, "answer.rdma")
    found["health"] = health_of(records["health"], values.get("epoch")) if "health" in (records or {}) else None
    unreadable: Any = _checked(values.get("unreadable") or [], [TEXT], "answer.unreadable")
    found["unreadable"] = [one_line(path) for path in unreadable]
    return found


def _acceptance(record: Mapping[str, Any]) -> dict[str, Any]:
    report = _object(record.get("report"), "records.acceptance.report")
    stamp = _object(record.get("stamp"), "records.acceptance.stamp")
    identity = _object(stamp.get("identity"), "records.acceptance.stamp.identity")
    at = record.get("at")
    return {
        "report": report,
        "at": "" if at is None else _checked(at, TEXT, "records.acceptance.at"),
        "identity": {key: _checked(value, maybe(TEXT), f"identity.{key}") for key, value in identity.items()},
    }


def _object(value: Any, place: str) -> dict[str, Any]:
    """Return an object; {} for null. Raises ValueError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_ITEMS:
        raise _odd(value, "an object", place)
    return value


def _checked(value: Any, schema: Schema, place: str) -> Any:
    """Return the parts of `value` that the schema names. Raises ValueError if one is missing or of another form."""
    if isinstance(schema, tuple):
        return None if value is None else _checked(value, schema[0], place)
    if isinstance(schema, list):
        if not isinstance(value, list) or len(value) > MAX_ITEMS:
            raise _odd(value, f"a list of at most {MAX_ITEMS:,}", place)
        return [_checked(each, schema[0], f"{place}[{number}]") for number, each in enumerate(value)]
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            raise _odd(value, "an object", place)
        missing = [key for key in schema if key not in value]
        if missing:
            raise ValueError(f"{place}: {', '.join(missing)} missing")
        return {key: _checked(value[key], each, f"{place}.{key}") for key, each in schema.items()}
    if not _FORMS[schema](value):
        raise _odd(value, schema, place)
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_NUMBER


_FORMS: dict[str, Callable[[Any], bool]] = {
    TEXT: lambda value: isinstance(value, str) and len(value) <= MAX_TEXT,
    NUMBER: _is_number,
    WHOLE: lambda value: isinstance(value, int) and _is_number(value),
    FLAG: lambda value: isinstance(value, bool),
    ANYTHING: lambda value: True,  # noqa: ARG005
}


def _odd(value: Any, expected: str, place: str) -> ValueError:
    return ValueError(f"{place}: expected {expected}; found {one_line(json.dumps(value)[:200], 60)}")
