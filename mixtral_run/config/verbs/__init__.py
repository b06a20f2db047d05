"""Settings of the verbs, made of the common settings one folder up."""
