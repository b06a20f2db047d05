"""Copy plan, copy, journal: HF to Megatron and back."""
