"""The console script, one file per command group."""
