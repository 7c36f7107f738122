"""The child process that runs a user's reward function; `guard_process.py` starts it.

The protocol is JSON lines over two pipes. The first input line names the function; the first output
line describes how to call it, or why it cannot be loaded. After that, each line
`{"id", "samples", "deadline_s"}` is answered by `{"id", "results"}`, where a result is
[reward, components, reasons] or {"failed": code, "message": text}. A plain or batch function
handles one line at a time, an async function all lines concurrently.

Output of the function goes to standard error; standard output is reserved for the protocol. The
process ends with its parent, even if it hangs (PR_SET_PDEATHSIG).

It is run by path, not as a module of the package, so that a start does not import `reward_fns`.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

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
    """Have the kernel kill this process when its parent ends, even while C code runs."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os._exit(1)
    with contextlib.suppress(OSError):  # out of memory, kill this process first
        Path("/proc/self/oom_score_adj").write_text("900", encoding="ascii")


def take_pipes() -> tuple[int, int]:
    """Return the protocol's pipes; redirect stdin to /dev/null and stdout to stderr."""
    pipe_in, pipe_out = os.dup(0), os.dup(1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return pipe_in, pipe_out


def send(pipe: int, message: Any) -> None:
    """Write one line."""
    line = memoryview(json.dumps(message).encode("ascii") + b"\n")
    while line:
        line = line[os.write(pipe, line) :]


def load(first: dict[str, Any]) -> Any:
    """Load the function that the first line names. Raises user_load.LoadError."""
    if "source" in first:
        source = base64.b64decode(first["source"])
        return user_load.load_file(first["path"], source, first["name"])
    return user_load.load_module(first["module"], first["name"])


def failed(error: BaseException) -> dict[str, Any]:
    """Return a failed call as the protocol encodes it."""
    if isinstance(error, Late):
        return {"failed": user_result.TIMEOUT, "message": "was cancelled"}
    if isinstance(error, user_result.BadResult):
        return {"failed": user_result.BAD_RESULT, "message": str(error)}
    message = user_result.where(error)
    return {"failed": user_result.RAISED, "type": type(error).__name__[:100], "message": message}


class Caller:
    """Calls one function with lists of samples."""

    def __init__(self, function: Any, constants: dict[str, Any]) -> None:
        self.function, self.constants = function, constants

    def call(self, samples: list[Any]) -> list[Any]:
        """Call a batch function once with all samples, any other function sample by sample."""
        return [result for group in self._groups(samples) for result in self._call(group)]

    async def call_async(self, samples: list[Any], deadline_s: float | None) -> list[Any]:
        """Like `call`, but await; calls of a non-batch function run concurrently."""
        import asyncio

        calls = [self._call_async(group, deadline_s) for group in self._groups(samples)]
        return [result for results in await asyncio.gather(*calls) for result in results]

    def _groups(self, samples: list[Any]) -> list[list[Any]]:
        return [samples] if self.function.batch else [[sample] for sample in samples]

    def _call(self, samples: list[Any]) -> list[Any]:
        try:
            result = self._plain(samples)
        except BaseException as error:  # SystemExit and KeyboardInterrupt cost only the sample too
            return [failed(error)] * len(samples)
        return self._read(result, len(samples))

    async def _call_async(self, samples: list[Any], deadline_s: float | None) -> list[Any]:
        try:
            result = await self._within(samples, deadline_s)
        except BaseException as error:
            return [failed(error)] * len(samples)
        return self._read(result, len(samples))

    def _read(self, result: Any, count: int) -> list[Any]:
        """Return one result per sample of a call."""
        if not self.function.batch:
            return [read_one(result)]
        try:
            return [read_one(part) for part in user_result.read_results(result, count)]
        except BaseException as error:
            return [failed(error)] * count

    def _plain(self, samples: list[Any]) -> Any:
        args, kwargs = self.function.arguments(samples, self.constants)
        result = self.function.call(*args, **kwargs)
        if hasattr(result, "__await__"):  # a plain function that returns a coroutine
            import asyncio

            result = asyncio.run(_awaited(result))
        return result

    async def _within(self, samples: list[Any], deadline_s: float | None) -> Any:
        import asyncio

        args, kwargs = self.function.arguments(samples, self.constants)
        task = asyncio.ensure_future(_awaited(self.function.call(*args, **kwargs)))
        done, _ = await asyncio.wait([task], timeout=deadline_s)
        if not done:
            task.cancel()
            raise Late
        return task.result()


class Late(BaseException):
    """An awaited call exceeded its deadline."""


def read_one(result: Any) -> Any:
    """Validate one result; return it as the protocol encodes it."""
    try:
        return user_result.read_result(result)
    except BaseException as error:
        return failed(error)


async def _awaited(result: Any) -> Any:
    return await result if hasattr(result, "__await__") else result


def serve(pipe_in: Any, pipe_out: int, caller: Caller) -> None:
    """Answer lines one by one until the parent closes the pipe."""
    for line in pipe_in:
        message = json.loads(line)
        send(pipe_out, {"id": message["id"], "results": caller.call(message["samples"])})


def serve_async(pipe_in: Any, pipe_out: int, caller: Caller) -> None:
    """Answer lines concurrently, each as soon as it is done."""
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
    """Load the function, describe it to the parent, and serve calls."""
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
        os._exit(status)  # the user's threads must not keep the process alive
