"""STAND-IN for lm-eval."""
