"""LoRA: settings, linear layers and experts with adapters, copies in the compute type."""
