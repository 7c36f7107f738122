"""The `verl.plugins` entry point: loaded by `import verl`, in every process of a run.

verl logs a failing plug-in at DEBUG only and goes on without it. A run that needs this one sets
RCOT_RL_PLUGIN=required, and then a failure is printed and ends the process.
"""

from __future__ import annotations

import os
import sys
import traceback

from rcot_rl import stacks


def _load() -> None:
    if os.environ.get("RCOT_RL_PLUGIN") != "required":
        return  # someone else's verl run in an environment where we are installed: stay out of it
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
