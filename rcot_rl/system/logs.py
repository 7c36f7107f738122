"""Where this project's loggers write: `[rcot] LEVEL module: message` on standard error.

Each entry point configures its own process: the console script, the `verl.plugins` entry point in
every process of a training stage, and the main modules of the other stage processes.
"""

from __future__ import annotations

import logging
import os
import sys

LOGGERS = ("rcot_rl", "reward_fns", "data_pipelines", "cluster", "__main__")
"""Parents of all loggers of the project; a module that is run with `-m` logs as `__main__`."""


class _StderrHandler(logging.StreamHandler):
    """The handler of the project's loggers."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, except lines below WARNING of ranks that repeat the first one's."""
        # read for each record: a forked process gets its rank after it inherited this handler
        if record.levelno >= logging.WARNING or os.environ.get("RANK", "0") == "0":
            super().emit(record)


def configure_logging(level: int) -> None:
    """Write the project's log records of at least `level` to standard error, one line each.

    A second call replaces the handler of the first. Records do not propagate: verl adds a handler
    to the root logger, which would print them again.
    """
    handler = _StderrHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("[rcot] %(levelname)s %(module)s: %(message)s"))
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [h for h in logger.handlers if not isinstance(h, _StderrHandler)]
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
