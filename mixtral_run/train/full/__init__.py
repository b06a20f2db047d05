"""Full fine-tuning: all weights train, and the state of AdamW is sharded over the ranks that hold the same weights."""
