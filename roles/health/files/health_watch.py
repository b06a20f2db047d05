#!/usr/bin/python3
"""Look at the GPUs, the fabric and the kernel log of this host; write a record and metrics; cordon a bad host.

    health_watch.py --record FILE --cordon-file FILE [--cordon] [--metrics FILE] [--interval-seconds N]
        [--settle-seconds N]

A systemd timer starts it as root. It resets, restarts and stops nothing. A check that cannot run is unknown, never bad.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import subprocess
import tempfile
import time

from watch_metrics import NOTHING, asks_for_action, bits, is_unreadable, is_yes, metrics, number

# Xid errors after which no job should start before somebody has acted, and the action that NVIDIA's catalog names.
XID_ACTIONS = {
    "reset the GPU when the host is idle": (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    "reboot the host": (79,),
    "check the power cable and the seat of the GPU": (54,),
    "reset the GPU; if remapping fails, replace it": (48,),
    "look at the links and the fabric manager, then reset the GPU": (74, 144, 145, 146, 147, 148, 149, 150),
    "ask NVIDIA's support": (157,),
}
BAD_XIDS = {number: action for action, numbers in XID_ACTIONS.items() for number in numbers}
RECOVERY_XID = 154
GPU_FIELDS = [
    "index", "uuid", "pci.bus_id", "temperature.gpu", "ecc.errors.uncorrected.volatile.total", "gpu_recovery_action",
    "fabric.state", "fabric.status", "pcie.link.width.current", "pcie.link.width.max", "clocks_event_reasons.active",
]  # fmt: skip
ROW_FIELDS = [
    "gpu_uuid", "remapped_rows.correctable", "remapped_rows.uncorrectable", "remapped_rows.pending",
    "remapped_rows.failure",
]  # fmt: skip
# NVML's bits for hardware slowdown, its thermal form and the power brake.
HARDWARE_SLOWDOWN = 0x8 | 0x40 | 0x80
MAX_EVENTS, MAX_TEXT = 50, 200
# A sick GPU keeps nvidia-smi in the kernel, where no signal ends it; the record must be written all the same.
COMMAND_SECONDS = 60
HUNG = []
LEVELS = ("bad", "warn", "unknown")
WHO = "health watch"


def run(*argv):
    """Return exit code and output of a program: 127 if it is not installed, 124 after COMMAND_SECONDS."""
    environment = dict(os.environ, LC_ALL="C")
    try:
        process = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )
    except OSError:
        return 127, ""
    try:
        output = process.communicate(timeout=COMMAND_SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        HUNG.append(process.pid)
        return 124, ""
    return process.returncode, output.decode("utf-8", "replace")


def still_hung(pids, proc="/proc"):
    """Return those of the processes that a look could not end and that still are nvidia-smi."""
    return [pid for pid in pids if isinstance(pid, int) and _text(f"{proc}/{pid}/comm") == "nvidia-smi"]


def one_that_hangs_is_enough(run, hung):
    """Return `run`, which no longer starts nvidia-smi once one of them does not answer. hung: one does not already."""
    silent = bool(hung)

    def ask(*argv):
        nonlocal silent
        if argv[0] == "nvidia-smi" and silent:
            return 124, ""
        code, text = run(*argv)
        silent = silent or (argv[0] == "nvidia-smi" and code == 124)
        return code, text

    return ask


class Findings(list):
    """What the checks found: level (bad, warn or unknown), a text, and a key that tells one event from another."""

    def add(self, level, text, key=None):
        self.append({"level": level, "text": text[:MAX_TEXT], "key": (key or text)[:MAX_TEXT]})

    def most_important(self):
        """Return at most MAX_EVENTS of them, each once: bad ones before others, and of each level the latest."""
        unique = list({finding["key"]: finding for finding in self}.values())
        latest_first = unique[::-1]
        kept = sorted(latest_first, key=lambda finding: LEVELS.index(finding["level"]))[:MAX_EVENTS]
        return [finding for finding in unique if finding in kept]


def query_gpus(findings, run=run):
    """Return the fields of each GPU by name. A field that this driver does not know is left out."""
    fields = list(GPU_FIELDS)
    while True:
        code, text = run("nvidia-smi", "--query-gpu=" + ",".join(fields), "--format=csv,noheader,nounits")
        unknown = re.search(r'Field "([^"]+)" is not a valid field to query', text)
        if not code or unknown is None or unknown.group(1) not in fields:
            break
        fields.remove(unknown.group(1))
    if code:
        words = {127: "nvidia-smi is not installed", 124: "nvidia-smi does not answer"}
        last = (text.strip().splitlines() or [""])[-1]
        findings.add("unknown", "GPUs: {}".format(words.get(code) or last or f"exit code {code}"))
        return []
    return table("GPUs", fields, text, findings)


def query_rows(findings, run=run):
    """Return the remapped rows of each GPU by its UUID. Empty where the GPUs have none, as with MIG instances."""
    code, text = run("nvidia-smi", "--query-remapped-rows=" + ",".join(ROW_FIELDS), "--format=csv,noheader")
    if code == 124:
        findings.add("unknown", "remapped rows: nvidia-smi does not answer")
    rows = table("remapped rows", ROW_FIELDS, text, findings) if not code else []
    return {row["gpu_uuid"]: row for row in rows}


def table(what, fields, text, findings):
    """Return the lines of nvidia-smi with their values by field. A line in another form is unknown."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.strip()]
    for row in rows:
        if len(row) != len(fields):
            findings.add("unknown", "{}: nvidia-smi answers: {}".format(what, ", ".join(row)))
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]  # noqa: B905


def check_gpus(gpus, rows, findings):
    """Add what the fields of the GPUs and their remapped rows say."""
    for gpu in gpus:
        name, row = "GPU {}".format(gpu["index"]), rows.get(gpu["uuid"], {})
        action = gpu.get("gpu_recovery_action", "")
        unread = {value: field for field, value in sorted(dict(gpu, **row).items()) if is_unreadable(value)}
        for value, field in unread.items():
            findings.add("unknown", f"{name}: nvidia-smi cannot read {field}: {value}")
        if asks_for_action(action):
            findings.add("bad", f"{name}: its driver asks for: {action}")
        if is_yes(row.get("remapped_rows.failure")):
            findings.add("bad", f"{name}: a row of its memory cannot be remapped; the GPU may have to be replaced")
        elif is_yes(row.get("remapped_rows.pending")):
            findings.add("warn", f"{name}: a row is to be remapped; reset the GPU when the host is idle")
        errors = number(gpu.get("ecc.errors.uncorrected.volatile.total"))
        if errors:
            findings.add("warn", f"{name}: {errors:g} uncorrectable ECC errors since the driver was loaded")
        width, most = number(gpu.get("pcie.link.width.current")), number(gpu.get("pcie.link.width.max"))
        if width and most and width < most:
            findings.add("warn", f"{name}: PCIe x{width:g} of x{most:g}; reseat the GPU or reboot")
        if bits(gpu.get("clocks_event_reasons.active")) & HARDWARE_SLOWDOWN:
            findings.add("warn", f"{name}: its clocks are slowed down by the hardware; look at cooling and power")


def check_fabric(gpus, findings, run=run, devices="/proc/driver/nvidia-nvswitch/devices"):
    """Add what is wrong with the fabric, and return the level of an inactive NVLink: bad where NVSwitches need all.

    GPUs that are not on NVSwitches answer [N/A]. Bridges between cards may be unused. While the fabric manager starts,
    the fabric is not complete, and links are inactive.
    """
    states = [(gpu["index"], gpu.get("fabric.state", ""), gpu.get("fabric.status", "")) for gpu in gpus]
    states = [each for each in states if each[1] not in NOTHING and not is_unreadable(each[1])]
    if not states and not glob.glob(os.path.join(glob.escape(devices), "*")):
        return "warn"
    # The state stays Completed when the fabric manager ends later, so its unit is asked too.
    code, text = run("systemctl", "show", "--property=LoadState,ActiveState", "nvidia-fabricmanager")
    unit = dict(line.partition("=")[::2] for line in text.splitlines())
    state, level = unit.get("ActiveState", ""), "bad"
    if code or not state:
        findings.add("unknown", "fabric manager: systemctl does not answer")
    elif unit.get("LoadState") == "not-found":
        # The fabric of a VM or of a GB200 may be managed from elsewhere: its GPUs then report a state.
        if not states:
            findings.add("bad", "the fabric manager is not installed")
    elif state in ("inactive", "failed"):
        findings.add("bad", f"the fabric manager is {state}")
    elif state != "active":
        level = "unknown"
        findings.add(level, f"the fabric manager is {state}")
    for index, state, status in states:
        if (state, status) != ("Completed", "Success") and not is_unreadable(status):
            findings.add(level, f"GPU {index}: fabric.state {state}, fabric.status {status}")
    return level


def check_links(findings, run=run, level="bad"):
    """Return the number of inactive NVLinks by GPU, and add them to the findings with a level."""
    code, text = run("nvidia-smi", "nvlink", "-s")
    if code == 124:
        findings.add("unknown", "NVLinks: nvidia-smi does not answer")
    gpu, links = None, {}
    for line in text.splitlines() if not code else []:
        found = re.match(r"GPU (\d+):", line)
        if found:
            gpu = found.group(1)
            links[gpu] = [0, 0]
        elif gpu is not None and re.match(r"\s*Link \d+:", line):
            links[gpu]["inactive" in line.lower()] += 1
    # GPUs without NVLink bridges, such as PCIe cards, have no active link at all.
    inactive = {gpu: counts[1] for gpu, counts in links.items() if counts[0]}
    for gpu, count in inactive.items():
        if count:
            findings.add(level, f"GPU {gpu}: {count} inactive NVLinks")
    return inactive


def kernel_log(findings, run=run):
    """Return the lines of the kernel since boot."""
    for argv in (("journalctl", "-k", "-b", "-o", "short-iso", "--no-pager", "-q"), ("dmesg",)):
        code, text = run(*argv)
        if not code and text.strip():
            return text.splitlines()
    findings.add("unknown", "the kernel log cannot be read")
    return []


def xid_events(lines):
    """Return the Xid errors in lines of the kernel log: time, GPU (PCI address), number and text."""
    found = []
    for line in lines:
        match = re.search(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)[^)]*\)[^:]*: (\d+)\b,?\s*(.*)", line)
        if match:
            when = re.match(r"\[\s*([\d.]+)\]|(\d{4}-\d\d-\d\dT\S+)", line)
            text = match.group(3)[:MAX_TEXT]
            time_text = (when.group(1) or when.group(2)) if when else ""
            found.append({"time": time_text, "gpu": match.group(1).lower(), "xid": int(match.group(2)), "text": text})
    return found


def check_log(lines, events, findings, boot):
    """Add what the kernel log says. boot: identity of this boot, so that an event has a key of its own."""
    seen, recovery = set(), {}
    for event in events:
        number, gpu = event["xid"], event["gpu"]
        if number == RECOVERY_XID:
            recovery[gpu] = event
        elif number in BAD_XIDS:
            key = "{} {} xid {} {}".format(boot, gpu, number, event["time"])
            if key not in seen:
                findings.add(
                    "bad", "Xid {} on GPU {} at {}: {}".format(number, gpu, event["time"], BAD_XIDS[number]), key
                )
            seen.add(key)
    for gpu, event in recovery.items():
        # The last of these lines holds: a later one says None again.
        action = re.search(r" to 0x[0-9a-fA-F]+ \(([^)]*)\)", event["text"])
        if action is None or action.group(1) not in NOTHING:
            wanted = action.group(1) if action else event["text"]
            key = "{} {} xid 154 {}".format(boot, gpu, event["time"])
            findings.add("bad", "Xid 154 on GPU {} at {}: {}".format(gpu, event["time"], wanted), key)
    for line in lines:
        switch = re.search(r"(nvidia-nvswitch\d*): SXid \(([^)]*)\): (\d+), Fatal", line)
        if switch:
            text = f"fatal SXid {switch.group(3)} on {switch.group(1)} ({switch.group(2)}): reboot the host"
            findings.add("bad", text, boot + " " + text)
        fallen = re.search(r"NVRM: GPU (?:at PCI:)?([0-9a-fA-F:.]+): GPU has fallen off the bus", line)
        if fallen and not any(event["xid"] == 79 for event in events):
            text = f"GPU {fallen.group(1)} has fallen off the bus: reboot the host"
            findings.add("bad", text, boot + " " + text)


def infiniband(findings, root="/sys/class/infiniband"):
    """Return how often the link of each port went down, and add the ports that are cabled but not active."""
    downs = {}
    for port in sorted(glob.glob(os.path.join(root, "*", "ports", "*"))):
        name = f"{port.split(os.sep)[-3]}/{os.path.basename(port)}"
        state, physical = _text(os.path.join(port, "state")), _text(os.path.join(port, "phys_state"))
        # A port without a cable is in Polling or Disabled.
        if "LinkUp" in physical and "ACTIVE" not in state:
            findings.add("warn", "InfiniBand port {}: {}".format(name, state.partition(": ")[2] or state))
        downs[name] = number(_text(os.path.join(port, "counters", "link_downed")))
    return downs


def look(run=run, hung=()):
    """Return the record of this moment, without what was known before. hung: programs that no look could end."""
    run = one_that_hangs_is_enough(run, hung)
    findings, boot = Findings(), _text("/proc/sys/kernel/random/boot_id")
    gpus = query_gpus(findings, run)
    rows = query_rows(findings, run) if gpus else {}
    check_gpus(gpus, rows, findings)
    level = check_fabric(gpus, findings, run)
    inactive = check_links(findings, run, level) if gpus else {}
    lines = kernel_log(findings, run)
    events = xid_events(lines)
    check_log(lines, events, findings, boot)
    downs = infiniband(findings)
    return {
        "findings": findings.most_important(),
        "gpus": [dict(gpu, **rows.get(gpu["uuid"], {})) for gpu in gpus],
        "inactive_nvlinks": inactive,
        "link_downed": downs,
        "xids": events[-MAX_EVENTS:],
        "reboot_required": os.path.exists("/run/reboot-required"),
    }


def cordon(record, path, now):
    """Cordon the host for what is bad and was not yet a reason. Return the keys that are or were a reason.

    A host that somebody uncordons is not cordoned again for the same event, and a record of somebody else stays.
    """
    bad = {each["key"]: each["text"] for each in record["findings"] if each["level"] == "bad"}
    known = [key for key in record["cordoned_for"] if key in bad]
    fresh = [key for key in bad if key not in known]
    # While a host is cordoned, its people see what the kernel log reports. It is no reason after they uncordon it.
    events = {each["key"] for each in record["findings"] if each["key"] != each["text"]}
    seen = known + [key for key in fresh if key in events]
    if os.path.exists(path):
        return seen
    for finding in record["findings"]:
        # What the kernel log reports stays there until the next boot, also after a reset of the GPU.
        if finding["key"] in known and finding["key"] != finding["text"]:
            finding.update(level="warn", text=finding["text"] + " (before somebody uncordoned the host)")
    if not fresh:
        return known
    reason = "; ".join(bad[key] for key in fresh)[:MAX_TEXT]
    values = {"reason": reason, "by": WHO, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))}
    try:
        write(path, json.dumps(values) + "\n", replace=False)
    except FileExistsError:
        return seen
    return known + fresh


def write(path, text, replace=True):
    """Write a file that all users can read, atomically. Raise FileExistsError if it exists and may not be replaced."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".health-", dir=folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
        if replace:
            os.rename(temporary, path)
        else:
            os.link(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _text(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20).strip()
    except OSError:
        return ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("record", "cordon-file", "metrics"):
        parser.add_argument("--" + name, default="", metavar="FILE", required=name != "metrics")
    parser.add_argument("--cordon", action="store_true", help="cordon the host if something is bad")
    parser.add_argument("--interval-seconds", type=int, default=300)
    parser.add_argument("--settle-seconds", type=float, default=900, help="cordon nothing so early after boot")
    options = parser.parse_args(argv)
    try:
        before = json.loads(_text(options.record) or "{}")
        known = [key for key in before["cordoned_for"] if isinstance(key, str)]
        hung = still_hung(before.get("hung", ()))
    except (ValueError, KeyError, TypeError, AttributeError):
        known, hung = [], []
    record, now = look(hung=hung), time.time()
    record.update({"cordoned_for": known, "epoch": int(now), "interval_seconds": options.interval_seconds})
    record["hung"] = hung + HUNG
    # A fabric manager that still starts has inactive links and an incomplete fabric on each NVSwitch host.
    settled = number(_text("/proc/uptime").partition(" ")[0]) >= options.settle_seconds
    if options.cordon and settled:
        record["cordoned_for"] = cordon(record, options.cordon_file, now)
    write(options.record, json.dumps(record, indent=1, sort_keys=True) + "\n")
    # Without the node exporter the folder may be missing.
    if options.metrics and os.path.isdir(os.path.dirname(options.metrics)):
        write(options.metrics, metrics(record, now, os.path.exists(options.cordon_file)))


if __name__ == "__main__":
    main()
