"""Two-stage inference (sections 3.2, 3.3): vLLM engine, VDG → KFG → AKS → KTG, predictions."""
