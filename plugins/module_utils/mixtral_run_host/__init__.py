"""Code that the kit's Ansible modules share. It runs on the hosts, with Python 3.8 and its standard library only."""
