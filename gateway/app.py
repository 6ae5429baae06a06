"""The worker's ASGI app and process: proxied paths go straight to proxy.py, the rest to Starlette.

`python -m gateway.app` is a worker, started by the supervisor with the listening socket it inherits.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway import openai, serving
from gateway.child import RETIRE, Child, exit_with_supervisor, read_child
from gateway.errors import GatewayError, InternalError, ModelNotFound, UnknownPath
from gateway.protocol import GatewayProtocol
from gateway.upstreams import Upstreams
from gateway.version import build
from gateway.worker import Worker
from replicas.board import Board

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 75  # uvicorn's 5 s would close the idle connections of a client's pool under its hands
BACKLOG = 4096
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class App:
    """What uvicorn is given: the ASGI app, and the worker that GatewayProtocol proxies for."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._rest = _starlette(worker)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._rest(scope, receive, send)


def _starlette(worker: Worker) -> Starlette:
    started = int(time.time())

    async def health(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def ready(request: Request) -> Response:
        if worker.ready.is_set() and not worker.stopping:
            return PlainTextResponse("ok")
        return PlainTextResponse("no generation yet" if not worker.stopping else "stopping", 503)

    async def models(request: Request) -> Response:
        worker.keys.check(dict(request.scope["headers"]))
        data = [_model(service, started) for service in worker.services.values()]
        return JSONResponse({"object": "list", "data": data})

    async def model(request: Request) -> Response:
        worker.keys.check(dict(request.scope["headers"]))
        name = request.path_params["name"]
        for service in worker.services.values():
            if name in (service.info.model, service.info.name):
                return JSONResponse(_model(service, started))
        raise ModelNotFound(
            f"The model {name!r} is not served here: GET /v1/models lists what is.", param="model"
        )

    async def failed(request: Request, error: Exception) -> Response:
        assert isinstance(error, GatewayError)
        worker.count(worker.default_service, "other", error.status, error.end)
        return _error(error)

    async def broken(request: Request, error: Exception) -> Response:
        log.error("GET %s failed by a fault of the gateway's own", request.scope["path"], exc_info=error)
        return await failed(request, InternalError("The gateway failed; the cause is in its log."))

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        scope = request.scope
        allowed = ", ".join(path.decode() for path in openai.ENDPOINTS)
        known = openai.ENDPOINTS.get(scope["raw_path"])
        if known is not None:
            answer = UnknownPath(
                f"{known.path} is served for POST only.", status=405, headers={"Allow": "POST"}
            )
        elif error.status_code == 405:
            answer = UnknownPath(
                f"{scope['path']} is served for GET only.", status=405, headers={"Allow": "GET"}
            )
        else:
            answer = UnknownPath(f"{scope['path']} is not served here. POST is served for {allowed}.")
        return await failed(request, answer)

    routes = [
        Route("/health", health),
        Route("/ready", ready),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
    ]
    handlers: dict[Any, Any] = {GatewayError: failed, HTTPException: unknown, Exception: broken}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return app


def _model(service: Upstreams, created: int) -> dict[str, Any]:
    info, cold = service.info, service.cold
    return {
        "id": info.model,
        "object": "model",
        "created": created,
        "owned_by": "skygate",
        "service": info.name,
        "state": info.state,
        "eta_seconds": cold.eta_seconds if cold is not None else None,
    }


def _error(error: GatewayError) -> Response:
    headers = dict(error.headers)
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(openai.error_body(error), error.status, headers, "application/json")


class Server(serving.Server):
    """With our order of stopping: first end what is held, then stop accepting, then let streams drain."""

    def __init__(
        self, config: uvicorn.Config, worker: Worker, serves: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config, serves)
        self._worker = worker

    def stop(self) -> None:
        """Stop; a second time, without waiting for the streams."""
        if self._worker.stopping:
            self.force_exit = True
        elif self.should_exit:  # it retires, with another limit
            asyncio.get_running_loop().call_later(self._worker.settings.drain_timeout, self._cut)
        self._worker.stop()
        self.should_exit = True

    def retire(self) -> None:
        """Another process has taken over: accept nothing more, but go on with all that is here, held requests
        too, for up to `--drain-limit`."""
        if not self.should_exit:
            self.config.timeout_graceful_shutdown = max(1, round(self._worker.settings.drain_limit))
            self.should_exit = True

    def _cut(self) -> None:
        for task in self.server_state.tasks:
            task.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals come by the event loop: uvicorn's way would interrupt any line, and die of the signal at
        the end."""
        loop = asyncio.get_running_loop()
        for number in _STOP_SIGNALS:
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(RETIRE, self.retire)
        try:
            yield
        finally:
            for number in (*_STOP_SIGNALS, RETIRE):
                loop.remove_signal_handler(number)


def config(app: App, *, drain_seconds: float, log_level: str) -> uvicorn.Config:
    """How uvicorn serves the public port."""
    return uvicorn.Config(
        app,
        http=GatewayProtocol,
        loop="uvloop" if sys.platform != "win32" else "asyncio",
        ws="none",
        lifespan="off",
        interface="asgi3",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        log_config=None,
        log_level=log_level,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )


async def serve(worker: Worker, sock: socket.socket, child: Child) -> None:
    """Serve on `sock` until SIGTERM."""
    settings = worker.settings
    server = Server(
        config(App(worker), drain_seconds=settings.drain_timeout, log_level=settings.log_level),
        worker,
        child.serves,
    )
    starting = asyncio.create_task(worker.start())
    loop = asyncio.get_running_loop()

    def reload() -> None:
        try:
            worker.reload(child.news())
        except (ValueError, TypeError):
            log.exception("keys and limits stay as they were")

    loop.add_signal_handler(signal.SIGHUP, reload)
    reload()  # what was said before anybody listened
    told = asyncio.Event()  # `cancel` does nothing in the turn of the loop in which the start ends

    def stop() -> None:
        told.set()
        starting.cancel()

    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, stop)  # until the server takes the signals over
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    if told.is_set() or starting.cancelled():
        await worker.close()
        return
    _quiet_collector()
    log.info("worker %d serves, %s", worker.index, build())
    await server.serve(sockets=[sock])
    await worker.close()


def _quiet_collector() -> None:
    """Requests leave no cycles behind (a test), so the collector looks rarely, and never at what the
    imports made: 10 % of the CPU of plain requests went into it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main() -> None:
    """A worker process."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a loop to hear it
    child = read_child()
    settings = child.settings
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s worker {child.index} %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    exit_with_supervisor(child.alive_fd)
    assert child.fd is not None
    sock = socket.socket(fileno=child.fd)
    sock.setblocking(False)
    with Board.open(settings.state_dir / "load.board") as board:
        uvloop_run(_main(child, board, sock))


async def _main(child: Child, board: Board, sock: socket.socket) -> None:
    await serve(Worker(child.settings, child.index, board), sock, child)


def uvloop_run(coroutine: Any) -> None:
    """asyncio.run on uvloop where there is one (it is not made for Windows)."""
    try:
        import uvloop
    except ImportError:  # pragma: no cover - every supported platform has it
        asyncio.run(coroutine)
        return
    uvloop.run(coroutine)


if __name__ == "__main__":
    main()
