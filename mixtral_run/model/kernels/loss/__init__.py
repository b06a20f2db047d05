"""The loss of the labels."""
