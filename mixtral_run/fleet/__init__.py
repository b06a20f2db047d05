"""The operator's side: hosts over SSH, plays, jobs in containers, status."""
