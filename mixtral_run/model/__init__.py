"""Mixtral on Megatron-core: architecture, parallel groups, attention, experts, adapters."""
