"""Reading a run folder, and the files in it that monitoring writes."""
