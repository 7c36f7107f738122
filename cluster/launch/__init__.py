"""Launch a run on this host, or submit it to Ray Jobs, Slurm or KubeRay."""
