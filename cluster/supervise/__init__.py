"""Start, watch, judge, retry and end the processes of a stage."""
