"""Throw-away hosts for tests: systemd as PID 1, a real sshd, a Docker engine inside, and the packages they install.

Each host is a container of the Docker engine that runs here, made from a debootstrap root filesystem, so no registry is
needed. `python -m mixtral_run.fleet.testhosts --help` starts, reimages and removes them by hand.
"""
