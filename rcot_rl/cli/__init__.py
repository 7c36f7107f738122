"""The console script `rcot`, with one module per command group."""
