"""Throw-away hosts with systemd as PID 1, an SSH server, a Docker engine inside, and a server for their packages.

`mixtral-run rehearse --host` and the host tests use them. Each host is a container of this machine's Docker engine,
made from a debootstrap root filesystem, so no registry is needed.
`python -m mixtral_run.fleet.testhosts --help` starts, reimages and removes hosts by hand.
"""
