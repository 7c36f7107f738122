"""This host, as a process of the platform meets it: CPUs, memory, disks, files, variables, git."""
