"""HF tensor names to Megatron keys and back; pure."""
