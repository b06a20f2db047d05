"""Settings of the schedulers that a job is handed over to (`--launcher`)."""
