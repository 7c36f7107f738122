"""The processes of CoT-SFT: `torchrun … -m rcot_rl.training.sft_main CONFIG.yaml`.

CONFIG.yaml is verl's complete SFT configuration, as `verl_config.sft_config` resolved it.
"""

from __future__ import annotations

import sys

from omegaconf import OmegaConf
from verl.trainer.sft_trainer import run_sft

if __name__ == "__main__":
    run_sft(OmegaConf.load(sys.argv[1]))
