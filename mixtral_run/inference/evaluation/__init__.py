"""Evaluation of a model on a test set, and with lm-eval."""
