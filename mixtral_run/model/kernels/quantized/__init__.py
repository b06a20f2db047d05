"""Products with fp8 and NF4 weights."""
