"""`rcot app`: a local web page for one query about one's own video.

The server listens on 127.0.0.1 only. Another site that is open in the same browser can neither ask
nor read: requests for another host name (DNS rebinding) or from another origin are refused. Other
users of this machine can open the page; they cannot guess the ids of queries. The page loads
nothing from elsewhere, and shows the model's text as text.

Not supported: several engines, user accounts, addresses other than 127.0.0.1 (use an SSH tunnel).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import tempfile
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from data_pipelines.corpora.json_node import is_text
from rcot_rl.errors import InputError
from rcot_rl.inference.app_jobs import OPEN, AppJob, AppLimits, JobQueue, QueueFull
from rcot_rl.inference.demo_clip import DEMO_INDEX, unseen_clip, write_clip_video
from rcot_rl.inference.model_folder import SHIPPED
from rcot_rl.inference.segment import SegmentModels
from rcot_rl.recipe.inference_section import LIGHT_FRAMES, PredictSection
from rcot_rl.system.disk import KINDS, explained

logger = logging.getLogger(__name__)

PAGE = Path(__file__).resolve().parent / "app_page"
_HOSTS = ["127.0.0.1", "localhost"]
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_KINDS = {
    "frames": ("frames", ".jpg"),
    "overlay": ("result/overlay", ".jpg"),
    "masks": ("result/masks", ".png"),
}
"""Kind of picture in a URL -> its folder below the query's, and its suffix."""


def serve(
    models: SegmentModels, port: int, limits: AppLimits, ready: Callable[[str], None]
) -> None:
    """Load the models and serve the page until Ctrl-C or SIGTERM.

    Args:
        models: Not entered yet.
        port: 0: a free one.
        ready: Called with the page's address once it can be opened.

    Raises:
        InputError: The port is taken, or the models cannot be loaded.
    """
    with _listen(port) as listener, tempfile.TemporaryDirectory(prefix="rcot-app-") as folder:
        queue = JobQueue(Path(folder), models, limits)
        try:
            server = uvicorn.Server(
                uvicorn.Config(
                    web_app(queue),
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    timeout_graceful_shutdown=2,
                )
            )
            ready(f"http://127.0.0.1:{listener.getsockname()[1]}")
            server.run([listener])
        except KeyboardInterrupt:  # uvicorn has shut down, and raises the signal again
            pass
        finally:
            queue.close()


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on port {port}: {reason}", key="--port") from error
    return listener


def web_app(queue: JobQueue) -> Starlette:
    """Return the page and its JSON interface.

    | request | answer |
    | --- | --- |
    | GET /api/setup | models, limits and the demo's query |
    | POST /api/jobs?query=&rounds=&light=&name=&demo= | the id; the body is the video |
    | GET /api/jobs/ID | state, message, steps, result |
    | POST /api/jobs/ID/cancel | nothing |
    | GET /api/jobs/ID/{frames,overlay,masks}/T | picture of frame T |
    | GET /api/jobs/ID/result.zip | masks, overlay.mp4, trace.json |

    An error is `{"error": one line}`.
    """
    server = _Server(queue)
    return Starlette(
        routes=[
            Route("/api/setup", server.setup),
            Route("/api/jobs", server.create, methods=["POST"]),
            Route("/api/jobs/{id}", server.show),
            Route("/api/jobs/{id}/cancel", server.cancel, methods=["POST"]),
            Route("/api/jobs/{id}/result.zip", server.download),
            Route("/api/jobs/{id}/{kind}/{t:int}", server.picture),
            Route("/demo.mp4", server.demo),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS),
            Middleware(BaseHTTPMiddleware, dispatch=_guard),
        ],
        exception_handlers={_Refused: _refused},
    )


class _Refused(Exception):
    def __init__(self, message: str, status: int = 400) -> None:
        self.message = message
        self.status = status


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, _Refused)
    return JSONResponse({"error": error.message}, error.status)


async def _guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse requests of other origins, and add headers that restrict the page."""
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers.get('host')}":
        return JSONResponse({"error": "this page belongs to another site"}, 403)
    response = await call_next(request)
    response.headers.update(_HEADERS)
    return response


class _Server:
    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        scene, query = unseen_clip(DEMO_INDEX)
        self.demo_query = query.text
        self.demo_video = queue.root / "demo.mp4"
        write_clip_video(self.demo_video, scene)

    async def setup(self, request: Request) -> Response:
        limits, models = self.queue.limits, self.queue.models
        return JSONResponse(
            {
                "version": metadata.version("rcot-rl"),
                "model": Path(models.model).name,
                "drawn_only": models.model in SHIPPED,
                "segmenter": models.segmenter.name,
                "device": models.device,
                "rounds": default_rounds(limits),
                "light_frames": LIGHT_FRAMES,
                "demo_query": self.demo_query,
                "limits": {
                    "upload_bytes": limits.upload_bytes,
                    "frames": limits.frames,
                    "query_chars": limits.query_chars,
                    "rounds": limits.rounds,
                },
            }
        )

    async def create(self, request: Request) -> Response:
        query, section = asked(request.query_params, self.queue.limits)
        is_demo = request.query_params.get("demo") == "1"
        name = "demo clip" if is_demo else display_name(request.query_params.get("name", ""))
        try:
            job = self.queue.create(query, section, name, self.demo_video if is_demo else None)
        except QueueFull:
            raise _Refused("too many queries are waiting; try again later", 429) from None
        try:
            if not is_demo:
                await self._receive(request, job)
        except BaseException:  # also a page that was closed
            self.queue.end(job, "failed", "the upload failed")
            raise
        self.queue.submit(job)
        return JSONResponse({"id": job.id}, 201)

    async def _receive(self, request: Request, job: AppJob) -> None:
        """Write the request's body to the query's folder; at most the limit is read."""
        most, size = self.queue.limits.upload_bytes, 0
        try:
            with (job.folder / "video").open("xb") as file:
                async for chunk in request.stream():
                    size += len(chunk)
                    if size > most:
                        raise _Refused(f"the video has more than {most >> 20} MiB", 413)
                    file.write(chunk)
        except ClientDisconnect as error:
            raise _Refused("the upload was interrupted") from error
        except OSError as error:
            if error.errno not in KINDS:
                raise
            reason = explained(error, self.queue.root)
            raise _Refused(f"the video cannot be stored: {reason}", 507) from error
        if not size:
            raise _Refused("choose a video")

    async def show(self, request: Request) -> Response:
        job = self._job(request)
        return JSONResponse(
            {
                "state": job.state,
                "message": job.message,
                "ahead": self.queue.ahead(job) if job.state == "waiting" else 0,
                "query": job.query,
                "name": job.name,
                "seconds": job.elapsed,
                "frames": len(job.names),
                "steps": job.steps,
                "result": job.result if job.state == "done" else None,
            },
            headers={"Cache-Control": "no-store"},
        )

    async def cancel(self, request: Request) -> Response:
        job = self._job(request)
        if job.state in OPEN:
            job.cancel.set()
            job.message = "cancelling"
        return Response(status_code=204)

    async def picture(self, request: Request) -> Response:
        job, t = self._job(request), request.path_params["t"]
        kind = _KINDS.get(request.path_params["kind"])
        if kind is None or not 0 <= t < len(job.names):
            raise _Refused("no such picture", 404)
        return await self._file(job.folder / kind[0] / f"{job.names[t]}{kind[1]}")

    async def download(self, request: Request) -> Response:
        job = self._job(request)
        return await self._file(job.folder / "result.zip", "rcot-result.zip")

    async def demo(self, request: Request) -> Response:
        return await self._file(self.demo_video)

    def _job(self, request: Request) -> AppJob:
        job = self.queue.jobs.get(request.path_params["id"])
        if job is None:
            raise _Refused("this result is no longer kept", 404)
        return job

    @staticmethod
    async def _file(path: Path, download: str | None = None) -> Response:
        if not await asyncio.to_thread(path.is_file):
            raise _Refused("not written yet, or no longer kept", 404)
        return FileResponse(
            path, filename=download, headers={"Cache-Control": "private, max-age=3600"}
        )


def asked(parameters: Any, limits: AppLimits) -> tuple[str, PredictSection]:
    """Return the query and the pipeline's settings of a request.

    Args:
        parameters: Mapping of the request's parameters, untrusted strings.

    Raises:
        _Refused: One is missing or beyond its limit.
    """
    query = parameters.get("query", "").strip()
    if not query:
        raise _Refused("the query is empty")
    if len(query) > limits.query_chars:
        raise _Refused(f"the query has more than {limits.query_chars} characters")
    if not is_text(query):
        raise _Refused("the query is not valid text")
    rounds = parameters.get("rounds", str(default_rounds(limits)))
    if not (rounds.isascii() and rounds.isdigit() and len(rounds) <= 3):
        raise _Refused("rounds must be a number")
    if int(rounds) > limits.rounds:
        raise _Refused(f"at most {limits.rounds} rounds")
    light = parameters.get("light") == "1"
    section = PredictSection(
        rounds=int(rounds),
        reevaluate_frames=LIGHT_FRAMES if light else None,
        max_frames=limits.shown_frames,
    )
    return query, section


def default_rounds(limits: AppLimits) -> int:
    """Return the pipeline's default number of rounds, or the limit if that is smaller."""
    return min(PredictSection().rounds, limits.rounds)


def display_name(name: str) -> str:
    """Return an uploaded file's name as it is shown: printable, and at most 120 characters."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name[:120])
    return shown.strip() or "video"
