"""Sections of --help."""

from __future__ import annotations

LAYOUT, DATA, PROMPTS, OPTIMIZER = "Model and layout", "Data", "Prompts and sampling", "Optimizer"
LORA, MEMORY, PROCESSES, COMPARISON, OUTPUT = "LoRA", "Memory and precision", "Processes", "Comparison", "Output"
