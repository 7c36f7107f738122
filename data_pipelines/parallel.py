"""Map a function over many small items with a few forked processes, results in order.

Workers are forked so that they share the corpora's masks, which are large and already loaded. At
most a short window of results waits in memory. Workers end with the parent process, even if it is
killed.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Progress = Callable[[str, int, int], None]
"""Called with (label, done, total)."""
_function: Callable[[Any], Any] | None = None
_PR_SET_PDEATHSIG = 1


def ordered_map(
    function: Callable[[_Item], _Result], items: Iterable[_Item], workers: int, chunk: int = 8
) -> Iterator[_Result]:
    """Yield `function(item)` for every item, in order, computed by `workers` processes.

    With one worker, everything runs in this process. An exception of `function` is raised at its
    item.

    Args:
        function: Any callable, also a bound method: it is inherited by the fork, not pickled.
        items: Pickled, like the results.
        chunk: Items per message to a worker.
    """
    if workers == 1:
        yield from map(function, items)
        return
    source = iter(items)
    waiting: deque[Future[list[_Result]]] = deque()
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_install,
        initargs=(function, os.getpid()),
    )
    try:
        while True:
            while len(waiting) < 2 * workers and (part := list(islice(source, chunk))):
                waiting.append(pool.submit(_work, part))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _install(function: Callable[[Any], Any], parent: int) -> None:
    global _function
    _function = function
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
    # Ctrl-C and SIGHUP are handled by the parent, which then shuts the pool down
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _work(part: list[Any]) -> list[Any]:
    assert _function is not None
    return [_function(item) for item in part]
