"""The stages of a run, one module each: the work in the parent and in the child process."""
