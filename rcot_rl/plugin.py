"""The `verl.plugins` entry point, which `import verl` loads in every process of a run.

verl logs a failing plug-in at DEBUG level and continues without it. Runs of rcot_rl therefore set
RCOT_RL_PLUGIN=required: a failure is printed and ends the process.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback

from rcot_rl.system import stacks
from rcot_rl.system.logs import configure_logging


def _load() -> None:
    if os.environ.get("RCOT_RL_PLUGIN") != "required":
        return  # another verl run in an environment where rcot_rl is installed
    configure_logging(logging.INFO)
    stacks.arm()
    try:
        from rcot_rl.training import verl_patches
        from rcot_rl.training.cpu import platform_cpu

        verl_patches.apply(cpu=platform_cpu.selected())
    except Exception:
        traceback.print_exc()
        sys.stderr.write("rcot_rl: the verl plug-in failed to load\n")
        sys.stderr.flush()
        os._exit(1)


_load()
