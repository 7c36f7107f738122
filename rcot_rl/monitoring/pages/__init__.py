"""HTML pages: the report of a run, comparisons of runs, replays of rewards."""
