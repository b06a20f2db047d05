"""What the kit's Ansible modules share. Runs on the hosts: Python 3.8 and the standard library are all it may use."""
