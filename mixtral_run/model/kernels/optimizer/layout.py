"""Layout of the tables that adamw.py writes and the kernel reads (adamw_triton.py)."""

CHUNK = 8192
"""Elements of a program."""
TENSOR_FIELDS = 10
"""Addresses of gradient, parameter, exp_avg, exp_avg_sq, copy (0 for none) and step; elements, row of the group, and
the first and the number of the group's corrections."""
OWN_ADDRESSES = 5
"""Those without the gradient's."""
GROUP_FIELDS = 8
"""Learning rate, beta1, beta2, weight decay, epsilon; the rest is unused."""
CORRECTION_FIELDS = 2
"""1 - beta1^step, and the root of 1 - beta2^step."""
