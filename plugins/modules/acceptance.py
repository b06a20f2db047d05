#!/usr/bin/python
"""Run the kit's acceptance measurements in its container; store the result with a stamp of the measured host."""

from __future__ import annotations

DOCUMENTATION = """
module: acceptance
short_description: Accept a host by measuring it in the container that jobs will use
description:
  - The stamp holds machine-id, SSH host key, GPU UUIDs and versions. Nothing runs again while the stamp matches the
    host and the last result was good. A reimaged host, another GPU or another image causes a new measurement.
  - The measurement is deferred while processes compute on the GPUs (C(deferred) is true then), unless
    C(measure_when_busy) is true.
options:
  host: {description: Name of the host in messages., type: str, required: true}
  image: {description: Image that the measurements run in., type: str, required: true}
  checkpoint_folder: {description: Folder that is mounted and measured., type: path, required: true}
  uid: {description: User ID in the container., type: int, required: true}
  gid: {description: Group ID in the container., type: int, required: true}
  shared_memory: {description: "Size of shared memory, for docker run --shm-size.", type: str, default: 32g}
  ulimits: {description: "Resource limits, for docker run --ulimit.", type: list, elements: str, default: []}
  floors: {description: Minimum values by name., type: dict, default: {}}
  model_floors:
    description: Higher minimum values by GPU model, a word of the GPU's name. They raise those of C(floors).
    type: dict
    default: {}
  size_mib: {description: "Size of the messages and of the test file, in MiB.", type: int, default: 256}
  timeout_seconds: {description: "Time limit of the measurement, in seconds.", type: int, default: 900}
  force: {description: Measure again even if nothing changed., type: bool, default: false}
  measure_when_busy: {description: Measure even while processes compute on the GPUs., type: bool, default: false}
  state: {description: C(absent) removes the result and the stamp., type: str, choices: [present, absent], default: present}
"""

import json
import time

from ..module_utils.mixtral_run_host import probe
from ..module_utils.mixtral_run_host.commands import MISSING, TIMED_OUT, last_lines, run
from ..module_utils.mixtral_run_host.engine import engine_use
from ..module_utils.mixtral_run_host.files import Record, explain
from ..module_utils.mixtral_run_host.gpu import gpu_driver, gpu_floors, since_acceptance
from ..module_utils.mixtral_run_host.start import run_module

KIT_VERSION = "import mixtral_run; print(mixtral_run.__version__)"


def main():
    run_module(
        act,
        {
            "host": {"type": "str", "required": True},
            "image": {"type": "str", "required": True},
            "checkpoint_folder": {"type": "path", "required": True},
            "uid": {"type": "int", "required": True},
            "gid": {"type": "int", "required": True},
            "shared_memory": {"type": "str", "default": "32g"},
            "ulimits": {"type": "list", "elements": "str", "default": []},
            "floors": {"type": "dict", "default": {}},
            "model_floors": {"type": "dict", "default": {}},
            "size_mib": {"type": "int", "default": 256},
            "timeout_seconds": {"type": "int", "default": 900},
            "force": {"type": "bool", "default": False},
            "measure_when_busy": {"type": "bool", "default": False},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
    )


def act(module):
    params = module.params
    record = Record("acceptance", check_mode=module.check_mode, mode=0o644)
    known = dict(record.values)
    if params["state"] == "absent":
        record.values.clear()
        record.save()
        module.exit_json(changed=bool(known))
    gpus = probe.gpus()
    if gpus["sick"]:
        module.fail_json(msg=probe.why_sick(gpus, params["host"]))
    stamp = _stamp(module, gpus)
    # Containers must see every GPU of the host: a CPU image on a GPU host is not accepted.
    params["floors"] = dict({"num_gpus": len(stamp["gpus"])}, **_floors(params, gpus))
    if stamp["image"] is None:
        if module.check_mode:
            module.exit_json(changed=True, why="the image is not on the host yet")
        _fail(module, "the image " + params["image"], "no such image", "run the image role")
    changes = _changes(known, stamp, params["floors"])
    if not changes and not params["force"]:
        if not isinstance(known.get("gpus"), dict):  # the record is of an older version
            record.values["gpus"] = _hardware(gpus)
        record.save()  # also opens the record of an older version, which only root could read
        module.exit_json(changed=False, report=known["report"], stamp=stamp, why="unchanged since it was accepted")
    _defer_when_busy(module, stamp, changes)
    if module.check_mode:
        module.exit_json(changed=True, why="; ".join(changes) or "forced")
    report = _measure(module, stamp)
    record.values.update(
        report=report,
        stamp=stamp,
        floors=params["floors"],
        gpus=_hardware(gpus),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    record.save()
    if not report["accepted"]:
        _fail(module, "every part runs and reaches its floor", "; ".join(report["problems"]),
              "see the figures in {}; floors are acceptance_floors".format(record.path), report=report)  # fmt: skip
    if report["not_run"]:
        module.warn("{}: accepted on its CPU alone; not run: {}".format(params["host"], ", ".join(report["not_run"])))
    module.exit_json(changed=True, report=report, stamp=stamp, why="; ".join(changes) or "forced")


def _floors(params, gpus):
    floors = {name: float(value) for name, value in params["floors"].items()}
    names = [gpu["name"] for gpu in gpus["gpus"]]
    return gpu_floors.floors_for(floors, params["model_floors"], names, bool(gpu_driver.nvswitch()))


def _stamp(module, gpus):
    image = run(["docker", "image", "inspect", "--format", "{{.Id}}", module.params["image"]], timeout=30)
    return {
        "identity": probe.identity(),
        "gpus": [gpu["uuid"] for gpu in gpus["gpus"]],
        "driver": gpus["driver"],
        "toolkit": probe.toolkit_version(),
        "engine": probe.engine_version(),
        "kernel": probe.os.uname().release,
        "image": image.out.strip() if image.code == 0 else None,
    }


def _hardware(gpus):
    return since_acceptance.hardware(gpus["gpus"], gpu_driver.active_nvlinks() if gpus["gpus"] else None)


def _changes(known, stamp, floors):
    """Return the reasons for a new measurement, as phrases. Return an empty list if the last result is still valid."""
    if not known:
        return ["never measured"]
    if not known["report"].get("accepted"):
        return ["not accepted the last time"]
    found = ["{} changed".format(name) for name in sorted(stamp) if stamp[name] != known["stamp"].get(name)]
    return found + (["floors changed"] if known.get("floors") != floors else [])


def _defer_when_busy(module, stamp, changes):
    """End the module without a measurement if a job computes: it would slow the job down and distort the result."""
    pids = engine_use.compute_pids() if stamp["gpus"] and not module.params["measure_when_busy"] else []
    if not pids:
        return
    why = "GPU processes are running (pid {})".format(", ".join(pids[:5]))
    module.warn(
        "{} waits to be measured ({}): {}. It is done by a later run when the GPUs are idle, or now with "
        "acceptance_measure_when_busy: true".format(module.params["host"], "; ".join(changes) or "forced", why)
    )
    module.exit_json(changed=False, deferred=True, reason=why)


def _container_argv(params, has_gpus):
    argv = ["docker", "run", "--rm", "--network", "none", "--shm-size", params["shared_memory"]]
    argv += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--pids-limit", "16384"]
    argv += [word for limit in params["ulimits"] for word in ("--ulimit", limit)]
    argv += ["--gpus", "all"] if has_gpus else []
    argv += ["--user", "{}:{}".format(params["uid"], params["gid"])]
    argv += ["--mount", "type=bind,source={},target=/checkpoints".format(params["checkpoint_folder"])]
    argv += [
        params["image"],
        "python",
        "-m",
        "mixtral_run.trial.acceptance",
        "--json",
        "--size-mib",
        str(params["size_mib"]),
    ]
    return argv + ["--floors", json.dumps(params["floors"])]


def _measure(module, stamp):
    params = module.params
    answer = run(_container_argv(params, bool(stamp["gpus"])), timeout=params["timeout_seconds"])
    line = answer.out.strip().splitlines()[-1] if answer.out.strip() else ""
    try:
        return json.loads(line)
    except ValueError:
        pass
    remedies = {
        MISSING: "run the docker role",
        TIMED_OUT: "a part hangs, which a lost NVLink or a dead fabric manager does: dmesg, nvidia-smi nvlink -s",
        125: "the engine refused the container: read the line above, and run the docker and toolkit roles",
    }
    _fail(module, "a report of the measurements", last_lines(answer, 8),
          remedies.get(answer.code, "run it by hand: {}".format(" ".join(_container_argv(params, bool(stamp["gpus"]))))))  # fmt: skip
    return None


def _fail(module, expected, found, next_step, **more):
    module.fail_json(
        msg=explain(
            "The host is not accepted.",
            where=module.params["host"],
            expected=expected,
            found=found,
            next_step=next_step,
        ),
        **more,
    )


if __name__ == "__main__":
    main()
