"""Differences of the GPUs from those with which the host was accepted. Pure.

`status` compares the hosts of a fleet with each other. A host alone, and a fleet that changed as a whole, can only be
compared with the host's own record.
"""

from __future__ import annotations

LEAST_MEMORY = 0.98
"""Share of the accepted memory. Versions of the driver keep different amounts of it for themselves."""

# The stamp of the acceptance is the same, so a bootstrap alone does not measure again.
ACCEPT = "; if intended: mixtral-run bootstrap HOST --tags acceptance -e acceptance_force=true"


def hardware(gpus, num_nvlinks):
    """Return what the record of the acceptance keeps of the GPUs, besides the stamp. A change of it measures nothing."""
    return {"memory_gib": {gpu["uuid"]: gpu["memory_gib"] for gpu in gpus}, "nvlinks": num_nvlinks}


def differences(state):
    """Yield (expected, found) for each difference. state: of the host, with its records and `nvlinks`, if they were read.

    The record may be of another kit, so each value may be missing or of another form.
    """
    record = _object((state.get("records") or {}).get("acceptance"))
    stamp, kept = _object(record.get("stamp")), _object(record.get("gpus"))
    accepted = stamp.get("gpus")
    if state["driver"]["error"] or not isinstance(accepted, list) or _of_another_host(stamp, state):
        return
    when = ", as measured on {:.10}".format(str(record.get("at") or "an unknown day"))
    uuids = [gpu["uuid"] for gpu in state["gpus"]]
    gone = [str(uuid) for uuid in accepted if uuid not in uuids]
    new = [uuid for uuid in uuids if uuid not in accepted]
    if len(uuids) != len(accepted):
        words = ", without {}".format(_some(gone)) if gone else ", with {}".format(_some(new))
        yield _count(len(accepted), "GPU") + when, _count(len(uuids), "GPU") + words
    elif gone:
        yield _some(gone) + when, "in its place {}".format(_some(new))
    yield from _less_memory(state["gpus"], _object(kept.get("memory_gib")), when)
    links, now = kept.get("nvlinks"), state.get("nvlinks")
    # A lost GPU takes its links with it.
    if isinstance(links, int) and isinstance(now, int) and now < links and not gone:
        yield _count(links, "active NVLink") + when + ACCEPT, _count(now, "active NVLink")
    if isinstance(stamp.get("driver"), str) and state["driver"]["user"] not in (None, stamp["driver"]):
        yield "driver {}{}".format(stamp["driver"], when), "driver {}".format(state["driver"]["user"])


def has_nvlinks(state):
    """Return True if the host was accepted with NVLinks, so that it is worth counting them again."""
    record = _object((state.get("records") or {}).get("acceptance"))
    return bool(_object(record.get("gpus")).get("nvlinks"))


def _less_memory(gpus, accepted, when):
    """Yield (expected, found) for GPUs with less memory. Those with the same difference, such as by ECC, are one."""
    alike = {}
    for gpu in gpus:
        before = accepted.get(gpu["uuid"])
        if isinstance(before, (int, float)) and gpu["memory_gib"] < LEAST_MEMORY * before:
            alike.setdefault((before, gpu["memory_gib"]), []).append(str(gpu["index"]))
    for (before, now), indexes in alike.items():
        found = "GPU{} {}: {:g} GiB of memory".format("s" if len(indexes) > 1 else "", ", ".join(indexes), now)
        yield "{:g} GiB{}".format(before, when) + ACCEPT, found


def _of_another_host(stamp, state):
    """Return True if the record came with a disk image of another host. `status` reports that by itself."""
    recorded = _object(stamp.get("identity"))
    return any(recorded.get(key) not in (None, "", value) for key, value in state["identity"].items())


def _object(value):
    return value if isinstance(value, dict) else {}


def _count(number, what):
    return "{} {}{}".format(number, what, "" if number == 1 else "s")


def _some(uuids):
    return ", ".join(uuids[:2]) + (" and {} more".format(len(uuids) - 2) if len(uuids) > 2 else "")
