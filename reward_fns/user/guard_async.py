"""Concurrent calls of an async user function from one asyncio loop.

An async function (that waits for a judge model, say) pays off only if its calls overlap. Each call
is one line to the same child, and each answer wakes its own caller. The child cancels a call that
exceeds its deadline. If the child hangs or dies, the parent cannot tell which call caused it, so
`Guard` repeats every open call alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any

from rcot_rl.errors import InputError
from reward_fns.user.guard import GRACE_S, Guard, Result, to_result
from reward_fns.user.guard_process import CallFailed, Child, encode
from reward_fns.user.user_result import DIED, TIMEOUT


class Multiplexer:
    """Open calls of the guard's function. Bound to the event loop of its first use."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._child: Child | None = None
        self._starting, self._alone = asyncio.Lock(), asyncio.Lock()
        self._open: dict[int, asyncio.Future[Result]] = {}
        self._ids = itertools.count(1)
        self._unread, self._unsent = bytearray(), bytearray()

    async def call(self, sample: Sequence[Any]) -> Result:
        """Call the function for one sample [response, ground truth, row]. Raises InputError."""
        number = next(self._ids)
        message = {"id": number, "samples": [sample], "deadline_s": self._guard.deadline_s}
        line = encode(message)
        try:
            child = await self._connected()
            self._open[number] = asyncio.get_running_loop().create_future()
            self._send(child, line)
            return await asyncio.wait_for(self._open[number], self._guard.deadline_s + GRACE_S)
        except InputError as error:
            return Result(0.0, failed=[DIED], message=str(error))
        except (TimeoutError, CallFailed) as error:
            others = len(self._open) > 1
            self._break(DIED if isinstance(error, CallFailed) else TIMEOUT)
            if others or isinstance(error, _WithOthers):
                async with self._alone:
                    return (await asyncio.to_thread(self._guard.call, [sample]))[0]
            code = error.code if isinstance(error, CallFailed) else TIMEOUT
            return Result(0.0, failed=[code], message=str(error) or "blocked its event loop")
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
                future.set_result(to_result(answer["results"][0]))

    def _fail(self, error: CallFailed) -> None:
        """Fail all open calls: the child is gone."""
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
                future.set_exception(_WithOthers(code, "another call broke the child"))


class _WithOthers(CallFailed):
    """The child failed while several calls were open."""
