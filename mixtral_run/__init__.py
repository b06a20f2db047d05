"""mixtral-run: bare 8-GPU hosts to Mixtral 8x7B conversion and LoRA fine-tuning with Megatron."""

__version__ = "0.2.0"
