"""Code for hosts without an accelerator: verl's platform and engine, vLLM's worker."""
