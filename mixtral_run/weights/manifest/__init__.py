"""`mixtral_run.json` and `proof.json`: what a folder is."""
