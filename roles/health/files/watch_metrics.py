"""Read the values that nvidia-smi prints, and write the record of the health watch as metrics for Prometheus."""

import math
import re

NOTHING = ("None", "N/A", "[N/A]", "Not Supported", "[Not Supported]", "")


def is_unreadable(text):
    """Return True for a value that nvidia-smi could not read: it then writes a reason, as in [Unknown Error]."""
    return text.startswith("[") and text not in NOTHING


def asks_for_action(text):
    """Return True if a recovery action of the driver is one."""
    return text not in NOTHING and not is_unreadable(text)


def is_yes(text):
    """Return True for a flag or count of nvidia-smi that is set: its drivers write Yes, or a number."""
    return bool(text) and (text.lower() == "yes" or number(text) > 0)


def number(text):
    """Return a number, or 0 for any other text."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return 0.0
    return value if math.isfinite(value) else 0.0


def bits(text):
    """Return the number of a bit mask in hexadecimal form, or 0 for any other text."""
    try:
        return int(text or "0", 16)
    except ValueError:
        return 0


def metrics(record, now, cordoned):
    """Return the record as text for the textfile collector of Prometheus's node exporter."""
    families = {}

    def add(name, help_text, value, **labels):
        lines = families.setdefault(name, [f"# HELP {name} {help_text}", f"# TYPE {name} gauge"])
        pairs = ",".join('{}="{}"'.format(key, re.sub(r'[\\"\n]', "_", str(text))) for key, text in labels.items())
        lines.append("{}{} {:.17g}".format(name, "{" + pairs + "}" if pairs else "", value))

    add("mixtral_run_health_last_run_seconds", "Time of the last look, in seconds since 1970.", now)
    add("mixtral_run_host_cordoned", "1 if the host takes no jobs.", int(cordoned))
    add("mixtral_run_reboot_required", "1 if an upgrade asks for a reboot.", int(record["reboot_required"]))
    for level in ("bad", "warn", "unknown"):
        count = sum(1 for each in record["findings"] if each["level"] == level)
        add("mixtral_run_health_findings", "Findings of the last look.", count, level=level)
    counts = {}
    for event in record["xids"]:
        counts[event["gpu"], event["xid"]] = counts.get((event["gpu"], event["xid"]), 0) + 1
    for (gpu, xid), count in sorted(counts.items()):
        add("mixtral_run_gpu_xid_errors", "Xid errors since boot.", count, gpu=gpu, xid=xid)
    for gpu in record["gpus"]:
        index = gpu["index"]
        add("mixtral_run_gpu_ecc_uncorrected", "Uncorrectable ECC errors since the driver was loaded.",
            number(gpu.get("ecc.errors.uncorrected.volatile.total")), gpu=index)  # fmt: skip
        for kind in ("correctable", "uncorrectable", "pending", "failure"):
            value = gpu.get("remapped_rows." + kind)
            if value is not None:
                count = int(is_yes(value)) if kind in ("pending", "failure") else number(value)
                add("mixtral_run_gpu_remapped_rows", "Remapped rows.", count, gpu=index, kind=kind)
        if "gpu_recovery_action" in gpu:
            action = gpu["gpu_recovery_action"]
            add("mixtral_run_gpu_recovery_needed", "1 if the driver asks for a recovery.",
                int(asks_for_action(action)), gpu=index, action=action)  # fmt: skip
    for gpu, count in record["inactive_nvlinks"].items():
        add("mixtral_run_gpu_nvlinks_inactive", "NVLinks that are inactive.", count, gpu=gpu)
    for port, count in record["link_downed"].items():
        add("mixtral_run_infiniband_link_downed", "How often the link went down.", count, port=port)
    return "\n".join(line for lines in families.values() for line in lines) + "\n"
