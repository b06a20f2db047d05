"""`rehearse`, `smoke`, logits parity, acceptance of a machine."""
