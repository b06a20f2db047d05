"""JSONL to token ids, packing, order of samples."""
