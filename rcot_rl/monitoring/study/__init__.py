"""A study: the runs of several recipes and seeds, table by table of the paper."""
