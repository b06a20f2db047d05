"""The schedule of the learning rate."""

from __future__ import annotations

import math

from mixtral_run.config.training import TrainingConfig


def learning_rate(config: TrainingConfig, iteration: int) -> float:
    """Return the rate of an iteration, counted from 0: linear warm-up to `lr`, cosine decay to `min_lr` at the end."""
    if iteration < config.lr_warmup_iters:
        return config.lr * (iteration + 1) / config.lr_warmup_iters
    steps = config.train_iters - 1 - config.lr_warmup_iters
    done = (iteration - config.lr_warmup_iters) / steps if steps > 0 else 0.0
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
