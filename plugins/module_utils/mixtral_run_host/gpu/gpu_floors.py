"""Minimum figures of the acceptance by GPU model. Pure functions."""

from __future__ import annotations

import re

BETWEEN_GPUS = ("all_reduce_gb_per_second", "all_to_all_gb_per_second")


def floors_for(floors, model_floors, gpu_names, nvswitch):
    """Return `floors` with each value raised to that of the GPU model. A floor that is not in `floors` is not added.

    Args:
        floors: minimum figures for any GPU.
        model_floors: minimum figures by model, a word of the GPU's name such as H100.
        gpu_names: the names of the GPUs. With GPUs of several models, none has floors of its own.
        nvswitch: True if the host has NVSwitches. The rates between GPUs depend on them.
    """
    models = [_model(name, model_floors) for name in gpu_names]
    found = dict(floors)
    if not models or models[0] is None or any(model != models[0] for model in models):
        return found
    for name, value in model_floors[models[0]].items():
        if name in found and (nvswitch or name not in BETWEEN_GPUS):
            found[name] = max(found[name], value)
    return found


def _model(name, models):
    """Return the model that is a whole word of a GPU's name: GH200 is not an H200."""
    words = re.split(r"[\s-]+", name)
    return next((model for model in models if model in words), None)
