"""Launchers: a run submitted to this host, to Ray Jobs, to Slurm or to KubeRay."""
