"""Hand a job over to Kubernetes: its manifest, and kubectl."""
