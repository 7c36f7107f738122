"""Everything said to the model (prompts) and by it (answers). Standard library and YAML only."""
