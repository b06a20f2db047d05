"""Run playbooks with ansible-runner."""
