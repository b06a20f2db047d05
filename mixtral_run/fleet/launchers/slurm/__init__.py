"""`--launcher slurm`: the batch script, and Slurm's own commands on this machine or on a login node."""
