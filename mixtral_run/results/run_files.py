"""Names of the files that a training run writes next to its checkpoints."""

from __future__ import annotations

RUN = "run.json"
"""What the run is: name, start, kit, settings, data. Written before the first iteration."""
METRICS = "metrics.jsonl"
"""The metrics of each iteration, a JSON object a line."""
VALIDATION = "validation.jsonl"
"""The evaluations of the validation set, a JSON object a line."""
SUMMARY = "summary.json"
"""The figures of the run, with everything of RUN. Written at the end."""
ROUTER = "router.jsonl"
"""Tokens by layer and expert, a JSON object a line."""
GENERATIONS = "generations.jsonl"
"""Answers to prompts of the validation set, before and after, a JSON object a line."""
REPORT = "report.html"
"""The page about the run. Written at the end."""
LOSS_PLOT = "loss.png"
"""The plot of the losses. Written at the end."""
TENSORBOARD = "tensorboard"
"""Folder of TensorBoard's scalars."""
WANDB = "wandb"
"""Folder of Weights & Biases, with --log-to wandb."""
ALL_FILES = (RUN, METRICS, VALIDATION, ROUTER, GENERATIONS, SUMMARY, LOSS_PLOT, REPORT, TENSORBOARD, WANDB)
GROWING = (METRICS, VALIDATION, ROUTER, GENERATIONS)
"""Files that get a line at a time. A resumed run removes the lines of iterations that it repeats."""
