"""The driver of the GPUs: readings, floors, shortfalls."""
