"""STAND-IN for lm-eval 0.4.13: the part of its interface that the kit uses, with the same names and conventions.

`tests/unit/inference/test_lm_eval_interface.py` compares it with the signatures of the real package.
"""

from lm_eval.evaluator import simple_evaluate

__all__ = ["simple_evaluate"]
