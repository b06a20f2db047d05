"""Hand a job over to a scheduler: one module or folder for each launcher."""
