"""Training on verl 0.9.1: CoT-SFT with LoRA, then GRPO.

verl is a dependency: everything attaches through its registries and hooks, which
`rcot_rl.plugin` fills in every process that imports verl. `verl_patches` holds the only
places where verl 0.9.1 leaves no hook.
"""
