"""Start, stop and death of the processes of a job."""
