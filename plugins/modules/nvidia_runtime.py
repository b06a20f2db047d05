#!/usr/bin/python
"""Keep the CDI spec up to date, check that the engine knows the runtime, and prove GPU access in a container."""

from __future__ import annotations

DOCUMENTATION = """
module: nvidia_runtime
short_description: Keep the CDI spec up to date and prove that containers reach the GPUs
description:
  - Writes the CDI spec if it is missing, or if its driver version or number of GPUs differs from the host's. If a
    systemd unit of the toolkit writes a spec, the kit's own spec is removed. An outdated spec of somebody else is
    replaced, with a backup.
  - With C(image), makes a CUDA call in a container and compares the number of GPUs with the host's. A successful
    nvidia-smi is no proof, because C(cuInit) can still fail. The proof is repeated only if driver, GPUs, toolkit, engine
    or image changed.
  - Does nothing on a host without GPUs.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  image: {description: "Image with Python 3 for the proof. It is not pulled; if it is empty or not on the host, there is no proof yet.", type: str, default: ""}
  cdi_path: {description: Path of the CDI spec if no systemd unit of the toolkit writes one., type: path, default: /etc/cdi/nvidia.yaml}
  state: {description: C(absent) removes the spec that the kit wrote., type: str, choices: [present, absent], default: present}
"""

import json
import os

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.commands import Result, last_lines, run
from ..module_utils.mixtral_run_host.files import Record, explain, read_text, remove, write_text
from ..module_utils.mixtral_run_host.gpu import gpu_driver
from ..module_utils.mixtral_run_host.start import run_module

OPTIONS = {
    "host": {"type": "str", "required": True},
    "image": {"type": "str", "default": ""},
    "cdi_path": {"type": "path", "default": "/etc/cdi/nvidia.yaml"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
}

REFRESH_UNIT = "nvidia-cdi-refresh.service"
UNIT_FOLDER = "/var/run/cdi"
CUDA_CALL = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
code = cuda.cuInit(0)
if code:
    raise SystemExit("cuInit fails with error %d" % code)
count = ctypes.c_int()
cuda.cuDeviceGetCount(ctypes.byref(count))
print(count.value)
"""


def main():
    run_module(act, OPTIONS)


def act(module):
    record = Record("nvidia_runtime", check_mode=module.check_mode)
    if module.params["state"] == "absent":
        path = record.values.get("cdi_path")
        changed = bool(record.values)
        if path and not module.check_mode:
            remove(path)
        record.values.clear()
        record.save()
        module.exit_json(changed=changed)
    state = probe.gpus()
    if state["sick"]:
        module.fail_json(msg=probe.why_sick(state, module.params["host"]))
    if not state["gpus"]:
        module.exit_json(changed=False, proof="skipped: " + (state["error"] or "the host has no GPU"))
    if probe.toolkit_version() is None:
        if module.check_mode:
            module.exit_json(changed=True, proof="skipped: check mode, the toolkit is not installed yet")
        module.fail_json(msg=explain("The NVIDIA container toolkit is not installed.", where=module.params["host"]))
    changed = _refresh_cdi(module, record, state)
    proof, proved = _prove(module, record, state)
    module.exit_json(changed=changed, proof=proof, proved=proved)


def _is_fresh(spec, state):
    return spec["path"] is not None and spec["gpus"] == len(state["gpus"]) and spec["driver"] in (None, state["driver"])


def _refresh_cdi(module, record, state):
    if _is_fresh(probe.cdi(), state) and not _outdone(record):
        return False
    if module.check_mode:
        return True
    answer = Result(0, "", "")
    if run(["systemctl", "cat", REFRESH_UNIT]).code == 0:
        answer = run(["systemctl", "restart", REFRESH_UNIT], timeout=120)
        if _outdone(record):
            remove(record.values.pop("cdi_path"))
            record.save()
    spec = probe.cdi()
    if answer.code == 0 and not _is_fresh(spec, state):
        answer = _generate(module, record, spec["path"])
    spec = probe.cdi()
    if answer.code or not _is_fresh(spec, state):
        module.fail_json(
            msg=explain(
                "The CDI spec cannot be brought up to date.",
                where=module.params["host"],
                expected="{} GPUs and driver {}".format(len(state["gpus"]), state["driver"]),
                found="{}; {}".format(spec, last_lines(answer, 4)),
                next_step="run `sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml` on the host",
            )
        )
    return True


def _outdone(record):
    """Return True if the toolkit's unit now writes a spec, so that the kit's own spec is no longer needed."""
    mine, units = record.values.get("cdi_path"), probe.cdi([UNIT_FOLDER])["path"]
    return bool(mine and units and os.path.realpath(mine) != os.path.realpath(units))


def _generate(module, record, stale):
    """Write the spec. Replace an outdated one in place: with two specs the devices would conflict."""
    path = stale or module.params["cdi_path"]
    if not stale:
        record.values["cdi_path"] = path
        record.save()
    elif path != record.values.get("cdi_path"):
        write_text(path + ".mixtral-run.bak", read_text(path))
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return run(["nvidia-ctk", "cdi", "generate", "--output=" + path], timeout=120)


def _prove(module, record, state):
    image = module.params["image"]
    known = run(["docker", "image", "inspect", "--format", "{{.Id}}", image], timeout=30) if image else None
    if known is None or known.code:
        return "no image with CUDA on the host yet: the acceptance role proves access", False
    engine = probe.engine()
    if "nvidia" not in engine["runtimes"]:
        _refuse(module, "runtime nvidia in `docker info`", "runtimes " + ", ".join(engine["runtimes"]),
                "Docker was not reloaded: run the docker role, or `sudo systemctl reload docker`")  # fmt: skip
    inputs = json.dumps([state["driver"], [gpu["uuid"] for gpu in state["gpus"]], probe.toolkit_version(),
                         engine["version"], known.out.strip()])  # fmt: skip
    if record.values.get("proved") == inputs:
        return "unchanged since it was proved", True
    if module.check_mode:
        return "skipped: check mode", False
    argv = [
        "docker",
        "run",
        "--rm",
        "--gpus",
        "all",
        "--network",
        "none",
        "--entrypoint",
        "python3",
        image,
        "-c",
        CUDA_CALL,
    ]
    answer = run(argv, timeout=180)
    if answer.code or answer.out.strip() != str(len(state["gpus"])):
        found = "{} GPUs".format(answer.out.strip()) if not answer.code else last_lines(answer, 4)
        _refuse(module, "{} GPUs answer a CUDA call in a container, as on the host".format(len(state["gpus"])), found,
                _remedy(answer))  # fmt: skip
    record.values["proved"] = inputs
    record.save()
    return "{} GPUs answer a CUDA call in a container".format(answer.out.strip()), True


def _remedy(answer):
    if answer.code:
        return "error 802: fabric manager; error 999 or 'unknown error': restart Docker, see `mixtral-run explain`"
    cut = [number for number, mode in enumerate(gpu_driver.modes().get("mig.mode.current", [])) if mode == "Enabled"]
    if cut:
        gpus = ",".join(str(number) for number in cut)
        return (
            "GPU {0} is in MIG mode, of which CUDA sees one instance: `sudo nvidia-smi -mig 0 -i {0}` when idle".format(
                gpus
            )
        )
    return (
        "CUDA sees one instance of a GPU in MIG mode: look at `nvidia-smi -L` and `nvidia-smi mig -lgi`; else at "
        "NVIDIA_VISIBLE_DEVICES and CUDA_VISIBLE_DEVICES of the image"
    )


def _refuse(module, expected, found, next_step):
    module.fail_json(
        msg=explain(
            "Containers do not reach the GPUs.",
            where=module.params["host"],
            expected=expected,
            found=found,
            next_step=next_step,
        )
    )


if __name__ == "__main__":
    main()
