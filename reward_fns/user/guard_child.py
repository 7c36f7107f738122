"""The process in which a user's reward function runs; `guard.py` starts it and speaks to it.

JSON lines over two pipes. The first line in says which function; the first line out, how it wants
to be called or why it cannot be. Then every line `{"id", "samples", "deadline_s"}` is answered by
`{"id", "results"}`, a result being [reward, components, reasons] or {"failed": code, "says": text}.
A plain or batch function is called a line at a time, an async one for all lines at once.

Whatever the function prints goes to standard error: standard output is the protocol's, and moved
out of its way. The process ends with its parent, hung or not (PR_SET_PDEATHSIG).

Run by path, not as a module of the package, so that a start does not import all of `reward_fns`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

RAISED = "reward_function_raised"
BAD_RESULT = "reward_function_bad_result"
TIMEOUT = "reward_function_timeout"
PR_SET_PDEATHSIG = 1


def _sibling(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_rcot_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


user_load = _sibling("user_load")
user_result = _sibling("user_result")


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, even while C code runs."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    with contextlib.suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")


def take_pipes() -> tuple[int, int]:
    """Protocol in and out; standard input becomes empty, standard output goes to the error's."""
    pipe_in, pipe_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return pipe_in, pipe_out


def send(pipe: int, message: Any) -> None:
    """One line out."""
    line = memoryview(json.dumps(message).encode("ascii") + b"\n")
    while line:
        line = line[os.write(pipe, line) :]


def load(first: dict[str, Any]) -> Any:
    """The function that the first line names. Raises user_load.LoadError."""
    if "source" in first:
        source = base64.b64decode(first["source"])
        return user_load.load_file(first["path"], source, first["name"])
    return user_load.load_module(first["module"], first["name"])


def failed(error: BaseException) -> dict[str, Any]:
    """A failed call as it crosses the pipe."""
    if isinstance(error, user_result.BadResult):
        return {"failed": BAD_RESULT, "says": str(error)}
    return {"failed": RAISED, "type": type(error).__name__[:100], "says": user_result.where(error)}


class Caller:
    """Calls one function for lists of samples."""

    def __init__(self, function: Any, constants: dict[str, Any]) -> None:
        self.function, self.constants = function, constants

    def call(self, samples: list[Any]) -> list[Any]:
        """All samples in one call of a batch function, one after another else."""
        if self.function.batch:
            return self.whole(lambda: self._plain(samples), samples)
        return [self.single(functools.partial(self._plain, [s])) for s in samples]

    def _plain(self, samples: list[Any]) -> Any:
        given, named = self.function.arguments(samples, self.constants)
        result = self.function.call(*given, **named)
        if hasattr(result, "__await__"):  # a plain function that hands out a coroutine
            import asyncio

            result = asyncio.run(_awaited(result))
        return result

    def whole(self, result: Callable[[], Any], samples: list[Any]) -> list[Any]:
        """One result a sample, or one failure for all."""
        try:
            found = user_result.read_results(result(), len(samples))
        except BaseException as error:
            return [failed(error)] * len(samples)
        return [self.single(functools.partial(_same, r)) for r in found]

    def single(self, result: Callable[[], Any]) -> Any:
        try:
            return user_result.read_result(result())
        except BaseException as error:  # SystemExit and KeyboardInterrupt cost one sample too
            return failed(error)

    async def call_async(self, samples: list[Any], deadline_s: float | None) -> list[Any]:
        """As `call`, awaiting; the samples of a function that takes one are awaited together."""
        import asyncio

        if self.function.batch:
            try:
                result = await self._within(samples, deadline_s)
            except BaseException as error:
                return [_late(error) or failed(error)] * len(samples)
            return self.whole(lambda: result, samples)

        async def one(sample: Any) -> Any:
            try:
                result = await self._within([sample], deadline_s)
            except BaseException as error:
                return _late(error) or failed(error)
            return self.single(lambda: result)

        return list(await asyncio.gather(*map(one, samples)))

    async def _within(self, samples: list[Any], deadline_s: float | None) -> Any:
        import asyncio

        given, named = self.function.arguments(samples, self.constants)
        task = asyncio.ensure_future(_awaited(self.function.call(*given, **named)))
        done, _ = await asyncio.wait([task], timeout=deadline_s)
        if not done:
            task.cancel()
            raise Late
        return task.result()


class Late(BaseException):
    """An awaited call overran its deadline."""


def _same(result: Any) -> Any:
    return result


def _late(error: BaseException) -> dict[str, Any] | None:
    return {"failed": TIMEOUT, "says": "was cancelled"} if isinstance(error, Late) else None


async def _awaited(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result


def serve(pipe_in: Any, pipe_out: int, caller: Caller) -> None:
    """Answer line by line until the parent closes the pipe."""
    for line in pipe_in:
        message = json.loads(line)
        send(pipe_out, {"id": message["id"], "results": caller.call(message["samples"])})


def serve_async(pipe_in: Any, pipe_out: int, caller: Caller) -> None:
    """Answer all open lines at once, each when it is done."""
    import asyncio

    async def answer(message: dict[str, Any]) -> None:
        results = await caller.call_async(message["samples"], message["deadline_s"])
        send(pipe_out, {"id": message["id"], "results": results})

    async def run() -> None:
        reader = asyncio.StreamReader(limit=2**40)
        protocol = asyncio.StreamReaderProtocol(reader)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe_in)
        open_answers = set()
        while line := await reader.readline():
            task = asyncio.create_task(answer(json.loads(line)))
            open_answers.add(task)
            task.add_done_callback(open_answers.discard)

    asyncio.run(run())


def main() -> None:
    die_with_parent(int(sys.argv[1]))
    descriptor, pipe_out = take_pipes()
    pipe_in = os.fdopen(descriptor, "rb", buffering=2**16)
    first = json.loads(pipe_in.readline())
    sys.argv = [""]
    try:
        function = load(first)
    except user_load.LoadError as error:
        send(pipe_out, {"error": str(error), "line": error.line, "key": error.key})
        return
    keys = None if function.row_keys is None else sorted(function.row_keys)
    described = {"style": function.style, "batch": function.batch, "is_async": function.is_async}
    described |= {"row_keys": keys, "components": function.components, "digest": function.digest}
    send(pipe_out, described)
    loop = serve_async if function.is_async else serve
    loop(pipe_in, pipe_out, Caller(function, first["constants"]))


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # no thread of the user's may keep the process alive
