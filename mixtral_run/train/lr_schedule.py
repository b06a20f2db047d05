"""The schedule of the learning rate."""

from __future__ import annotations

import math

from mixtral_run.config.schedule import ScheduleConfig


def learning_rate(config: ScheduleConfig, iteration: int) -> float:
    """Return the learning rate of an iteration, counted from 0.

    During the warmup it rises linearly and reaches `lr` in the last warmup iteration. After that it falls from `lr` to
    `min_lr`, which the last iteration has: along a cosine as torch's CosineAnnealingLR, or along a line as its
    LinearLR. Under `constant` it stays at `lr`.
    """
    warmup = config.warmup_iters
    if iteration < warmup:
        return config.lr * (iteration + 1) / warmup
    if config.lr_scheduler == "constant":
        return config.lr
    steps = config.iterations - 1 - warmup
    done = min((iteration - warmup) / steps, 1.0) if steps > 0 else 0.0
    left = 1 - done if config.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left
