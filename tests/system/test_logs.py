"""The project's log lines: one format, one handler, on standard error."""

from __future__ import annotations

import logging
import sys

import pytest

from rcot_rl.system.logs import LOGGERS, configure_logging


def test_line_names_level_and_module_on_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(logging.INFO)
    for name in LOGGERS:
        logging.getLogger(name).getChild("part").info("%d rows", 3)
    logging.getLogger("rcot_rl.part").debug("too low")
    logging.getLogger("verl").info("not ours")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "[rcot] INFO test_logs: 3 rows\n" * len(LOGGERS)


def test_each_record_is_one_line_beside_a_root_handler(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.StreamHandler(sys.stderr)  # as verl adds one
    logging.getLogger().addHandler(root)
    try:
        configure_logging(logging.INFO)
        configure_logging(logging.INFO)
        logging.getLogger("cluster.part").warning("late")
    finally:
        logging.getLogger().removeHandler(root)
    assert capsys.readouterr().err == "[rcot] WARNING test_logs: late\n"


def test_ranks_after_the_first_log_only_warnings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_logging(logging.INFO)
    logger = logging.getLogger("rcot_rl.part")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        logger.info("rank %s", rank)
        logger.warning("rank %s", rank)
    assert [line.split(" ", 1)[1] for line in capsys.readouterr().err.splitlines()] == [
        "INFO test_logs: rank 0",
        "WARNING test_logs: rank 0",
        "WARNING test_logs: rank 1",
    ]
