"""Many open calls of an async user function at once, from one asyncio loop.

A function that waits (for a judge's answer, say) is only worth being async if its calls overlap.
Here every call is one line to the same child, and every answer wakes its own caller. The child
cancels a call that overruns its deadline. When it stops answering altogether, or dies, it cannot be
told from here which call did that: every open one is then made again, alone, by `Guard`.

Left out: batch and plain functions, which `Guard.call` serves.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.user.guard import GRACE_S, Guard, Result, read
from reward_fns.user.guard_process import DIED, TIMEOUT, CallFailed, Child, encode


class Multiplexer:
    """Open calls of `guard`'s function. Belongs to the loop in which it is first used."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._child: Child | None = None
        self._starting, self._alone = asyncio.Lock(), asyncio.Lock()
        self._open: dict[int, asyncio.Future[Result]] = {}
        self._ids = itertools.count(1)
        self._unread, self._unsent = bytearray(), bytearray()

    async def call(self, sample: Sequence[Any]) -> Result:
        """The result of [response, ground truth, row]. Raises InputError for a row not JSON."""
        number = next(self._ids)
        message = {"id": number, "samples": [sample], "deadline_s": self._guard.deadline_s}
        line = encode(message)
        try:
            child = await self._connected()
            self._open[number] = asyncio.get_running_loop().create_future()
            self._send(child, line)
            return await asyncio.wait_for(self._open[number], self._guard.deadline_s + GRACE_S)
        except InputError as error:
            return Result(0.0, failed=[DIED], says=str(error))
        except (TimeoutError, CallFailed) as error:
            others = len(self._open) > 1
            self._break(DIED if isinstance(error, CallFailed) else TIMEOUT)
            if others or isinstance(error, _WithOthers):
                async with self._alone:
                    return (await asyncio.to_thread(self._guard.call, [sample]))[0]
            code = error.code if isinstance(error, CallFailed) else TIMEOUT
            return Result(0.0, failed=[code], says=str(error) or "blocked its event loop")
        finally:
            self._open.pop(number, None)

    def close(self) -> None:
        """End the child; open calls fail."""
        self._break(DIED)

    async def _connected(self) -> Child:
        async with self._starting:
            if self._child is None:
                child = await asyncio.to_thread(Child, self._guard.source, self._guard.constants)
                loop = asyncio.get_running_loop()
                loop.add_reader(child.pipe_out, self._answers, child)
                loop.add_reader(child.pipe_err, self._printed, child)
                self._unread, self._unsent, self._child = bytearray(), bytearray(), child
            return self._child

    def _printed(self, child: Child) -> None:
        if not child.drain():
            asyncio.get_running_loop().remove_reader(child.pipe_err)

    def _send(self, child: Child, line: bytes) -> None:
        self._unsent += line
        self._flush(child)

    def _flush(self, child: Child) -> None:
        loop = asyncio.get_running_loop()
        try:
            sent = child.write(memoryview(bytes(self._unsent)))
        except CallFailed as error:
            self._fail(error)
            return
        del self._unsent[:sent]
        if self._unsent:
            loop.add_writer(child.pipe_in, self._flush, child)
        else:
            loop.remove_writer(child.pipe_in)

    def _answers(self, child: Child) -> None:
        try:
            chunk = os.read(child.pipe_out, 2**16)
        except BlockingIOError:
            return
        if not chunk:
            self._fail(child.died())
            return
        self._unread += chunk
        *lines, rest = bytes(self._unread).split(b"\n")
        self._unread = bytearray(rest)
        for line in lines:
            answer = json.loads(line)
            future = self._open.get(answer["id"])
            if future is not None and not future.done():
                future.set_result(read(answer["results"][0]))

    def _fail(self, error: CallFailed) -> None:
        """The child is gone: all open calls hear it."""
        alone = len(self._open) == 1
        for future in self._open.values():
            if not future.done():
                future.set_exception(error if alone else _WithOthers(error.code, str(error)))
        self._break(error.code)

    def _break(self, code: str) -> None:
        child, self._child = self._child, None
        if child is None:
            return
        loop = asyncio.get_running_loop()
        for pipe in (child.pipe_out, child.pipe_err):
            loop.remove_reader(pipe)
        loop.remove_writer(child.pipe_in)
        child.close()
        for future in self._open.values():
            if not future.done():
                future.set_exception(_WithOthers(code, "with others"))


class _WithOthers(CallFailed):
    """The child failed while several calls were open."""
