"""Start the processes of a job, pass on signals, collect errors."""
