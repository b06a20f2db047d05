"""What roles do to a host, a step a file: `OPTIONS` as AnsibleModule takes them, and `main(module)`."""
