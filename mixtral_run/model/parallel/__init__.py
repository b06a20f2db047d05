"""Process groups, how parameters are sharded, the only import of megatron-core, CPU stand-ins."""
