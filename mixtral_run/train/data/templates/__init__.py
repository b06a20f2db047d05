"""Chat templates: examples to token ids and the spans that are learned."""
