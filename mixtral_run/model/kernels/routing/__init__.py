"""The router: its choice of experts, and the gradient of their probabilities."""
