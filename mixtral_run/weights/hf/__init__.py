"""Safetensors headers, hub downloads, tokenizer files, fingerprints."""
