"""Two-stage inference (sections 3.2, 3.3): vLLM's engine, VDG → KFG → AKS → KTG, segmentation."""
