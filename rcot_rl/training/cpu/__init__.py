"""What only a CPU needs: verl's platform and engine, vLLM's worker."""
