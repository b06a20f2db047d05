"""Training with real process groups: layouts, data, resume, quantized experts."""
