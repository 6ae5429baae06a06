"""The controller's HTTP side, on the admin port: status, limits, retry, down, events, logs, /metrics, the
status page.

`python -m gateway.admin` is the controller process (see `assembly.py` for what it is made of). Errors have
the shape of OpenAI's, so that one reader of errors serves both ports: `{"error": {message, type, param,
code}}`.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.logs import NoLog, follow, known_replicas, read, select
from gateway.settings import is_loopback
from gateway.statedir import read_address
from replicas.board import SLOTS

log = logging.getLogger("gateway.admin")

EVENTS_PING_SECONDS = 15.0
DEFAULT_TAIL_LINES = 200
MAX_TAIL_LINES = 100_000
MAX_RANK = 10_000
MAX_LAST_EVENTS = 1000
MAX_BODY_BYTES = 64 * 1024
# No resource of another origin, no frame of another page: the page can end machines.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self';"
        " frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


class Controller(Protocol):
    """What the admin port needs of `replicas.controller.Controller`."""

    def status(self) -> dict[str, Any]: ...
    def set_limits(self, name: str, min: int | None = None, max: int | None = None) -> Any: ...
    def reset_limits(self, name: str) -> Any: ...
    def retry(self, name: str) -> None: ...
    def cost(self, since: str | None = None, by: str = "day") -> dict[str, Any]: ...
    async def down(self) -> list[str]: ...
    def events(self, last: int = 0) -> AsyncIterator[dict[str, Any]]: ...


class AdminError(HTTPException):
    """A call that cannot be done; `detail` says what is allowed."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message)
        self.code, self.param = code, param


class Admin:
    """The endpoints. Mutable: `_down`, the one running `gateway down`, and how it went.

    `about`: constant facts of this gateway for the status. `ended` is set when down has finished: the process
    exits then and its supervisor ends the gateway. `stopping` ends open event and log streams. `restart` asks
    the supervisor for one; how it goes is in the state dir.
    """

    def __init__(
        self,
        controller: Controller,
        state_dir: Path,
        registry: Callable[[Callable[[], Mapping[str, Any]]], CollectorRegistry],
        about: Mapping[str, Any],
        *,
        restart: Callable[[], None] = lambda: None,
    ) -> None:
        self._controller = controller
        self._restart = restart
        self._state_dir = state_dir
        self._registry = registry
        self._about = dict(about)
        self._down: asyncio.Task[None] | None = None
        self._down_error = ""
        self.ended = asyncio.Event()
        self.stopping = asyncio.Event()

    def app(self, admin_key: str | None = None) -> ASGIApp:
        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/admin/status", self.get_status),
            Route("/admin/cost", self.get_cost),
            Route("/admin/services/{name}/limits", self.put_limits, methods=["PUT"]),
            Route("/admin/services/{name}/retry", self.post_retry, methods=["POST"]),
            Route("/admin/down", self.post_down, methods=["POST"]),
            Route("/admin/restart", self.post_restart, methods=["POST"]),
            Route("/admin/events", self.get_events),
            Route("/admin/replicas", self.get_replicas),
            Route("/admin/replicas/{id}/logs", self.get_logs),
        ]
        handlers: Any = {HTTPException: _error, Exception: _fault}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), admin_key)

    # -- reading ----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        down = None
        if self._down is not None:
            down = {"done": self.ended.is_set(), "error": self._down_error or None}
        restart = (read_address(self._state_dir) or {}).get("restart")
        gateway = {**self._about, "down": down, "restart": restart}
        return {**self._controller.status(), "gateway": gateway}

    async def page(self, request: Request) -> Response:
        return HTMLResponse(Path(__file__).with_name("page.html").read_text(), headers=PAGE_HEADERS)

    async def health(self, request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(self, request: Request) -> Response:
        registry = self._registry(self._controller.status)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def get_status(self, request: Request) -> Response:
        return JSONResponse(self.status(), headers={"Cache-Control": "no-store"})

    async def get_cost(self, request: Request) -> Response:
        """What replicas have cost, an estimate: by day, replica or key; `since` as `7d` or a date."""
        query = request.query_params
        try:
            bill = self._controller.cost(query.get("since") or None, query.get("by") or "day")
        except ValueError as error:
            raise AdminError(400, str(error), "invalid_request") from None
        return JSONResponse(bill, headers={"Cache-Control": "no-store"})

    async def get_replicas(self, request: Request) -> Response:
        """Every replica that has left output, the newest first: those of the status, and dead ones."""
        live = self.live()
        known = known_replicas(self._state_dir)
        return JSONResponse([{**replica, "live": replica["id"] in live} for replica in known])

    async def get_events(self, request: Request) -> Response:
        """Decisions, transitions, launches ... as they come; `last` past ones first."""
        events = self._controller.events(_number(request, "last", 0, MAX_LAST_EVENTS))
        return StreamingResponse(self._sse(events), media_type="text/event-stream", headers=_STREAM_HEADERS)

    async def _sse(self, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
        stop = asyncio.ensure_future(self.stopping.wait())
        following: asyncio.Task[dict[str, Any]] | None = None
        try:
            yield ": events\n\n"
            while not stop.done():
                following = following or asyncio.ensure_future(_next(events))
                either = {following, stop}
                await asyncio.wait(either, timeout=EVENTS_PING_SECONDS, return_when="FIRST_COMPLETED")
                if not following.done():
                    yield ": ping\n\n"
                    continue
                try:
                    event = following.result()
                except StopAsyncIteration:
                    return
                following = None
                yield f"data: {json.dumps(event)}\n\n"
        finally:
            stop.cancel()
            if following is not None:
                following.cancel()

    async def get_logs(self, request: Request) -> Response:
        """What a replica printed (`rank`: only that one's lines), or the log of its provisioning."""
        replica, asked = request.path_params["id"], request.query_params
        lines = _number(request, "tail", DEFAULT_TAIL_LINES, MAX_TAIL_LINES)
        rank = _number(request, "rank", 0, MAX_RANK) if asked.get("rank") else None
        try:
            log = select(self._state_dir, replica, provision=_yes(asked.get("provision")), rank=rank)
            text, end = await asyncio.to_thread(read, log, lines)
        except NoLog as error:
            raise AdminError(404, str(error), "replica_not_found", "id") from None
        if not _yes(asked.get("follow")):
            return PlainTextResponse(text)

        def live() -> bool:
            return not self.stopping.is_set() and replica in self.live()

        chunks = follow(log, text, end, live)
        return StreamingResponse(chunks, media_type="text/plain", headers=_STREAM_HEADERS)

    # -- changing ---------------------------------------------------------------------------------

    async def put_limits(self, request: Request) -> Response:
        service = self._service(request)
        body = await _json(request)
        unknown = body.keys() - {"min", "max", "reset"}
        if unknown:
            raise AdminError(400, f"unknown: {sorted(unknown)}; allowed: min, max, reset", "invalid_request")
        if body.get("reset"):
            if body.keys() != {"reset"}:
                raise AdminError(400, "reset goes alone, without min and max", "invalid_request", "reset")
            self._controller.reset_limits(service["name"])
        else:
            self._controller.set_limits(service["name"], *_limits(body, service["limits"]))
        return JSONResponse(self._find(service["name"]))

    async def post_retry(self, request: Request) -> Response:
        name = self._service(request)["name"]
        self._controller.retry(name)
        return JSONResponse(self._find(name))

    async def post_down(self, request: Request) -> Response:
        """Starts once; 202 at once, however long it takes: the status tells how it goes, and the end of this
        process that every replica is verified gone."""
        if self._down is None or (self._down.done() and not self.ended.is_set()):
            self._down_error = ""
            self._down = asyncio.create_task(self._end_replicas())
        return JSONResponse(self.status(), status_code=202)

    async def post_restart(self, request: Request) -> Response:
        """New processes one by one, this one first; 202 at once, the status of the next one tells how it
        goes."""
        before = self.status()
        self._restart()
        return JSONResponse(before, status_code=202)

    async def _end_replicas(self) -> None:
        try:
            remaining = await self._controller.down()
            if remaining:
                raise RuntimeError(f"still there: {', '.join(remaining)}")
        except Exception as error:
            log.exception("down failed")
            self._down_error = str(error) or type(error).__name__
        else:
            self.ended.set()

    def live(self) -> set[str]:
        """Ids of all replicas that are not verified gone."""
        services = self._controller.status()["services"]
        return {replica["id"] for service in services for replica in service["replicas"]}

    def _find(self, name: str) -> dict[str, Any] | None:
        found: list[dict[str, Any]] = [s for s in self._controller.status()["services"] if s["name"] == name]
        return found[0] if found else None

    def _service(self, request: Request) -> dict[str, Any]:
        name = request.path_params["name"]
        service = self._find(name)
        if service is None:
            names = ", ".join(s["name"] for s in self._controller.status()["services"])
            raise AdminError(404, f"no service {name!r}: there is {names}", "service_not_found", "name")
        return service


class Guard:
    """Who may call: with a key, whoever has it. Without one, programs of this machine, but not the web pages
    that its browser shows: no foreign Origin, and no name that a stranger's DNS could point here."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self._app = app
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(scope["path"], dict(scope["headers"]), scope["method"])
            if refusal is not None:
                return await refusal(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, path: str, headers: Mapping[bytes, bytes], method: str) -> Response | None:
        host = headers.get(b"host", b"").decode("latin-1")
        origin = headers.get(b"origin")
        foreign = origin is not None and urlsplit(origin.decode("latin-1")).netloc != host
        if foreign and method not in ("GET", "HEAD"):
            return _body(403, "a page of another origin may not change anything here", "foreign_origin")
        if self._key is None:
            name = urlsplit(f"//{host}").hostname or ""
            if host and not (is_loopback(name) or _IS_ADDRESS.fullmatch(name)):
                message = f"call the admin port by its address or localhost, not {name!r}"
                return _body(403, message, "foreign_host")
            return None
        if path in ("/", "/health"):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        message = "send Authorization: Bearer with the admin key (gateway ... --admin-key, GATEWAY_ADMIN_KEY)"
        return _body(401, message, "invalid_admin_key", headers={"WWW-Authenticate": "Bearer"})


_IS_ADDRESS = re.compile(r"[0-9.]+|[0-9a-fA-F:.%]*:[0-9a-fA-F:.%]*")
_STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def _limits(body: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """(min, max) that a call asks for; None = as it is. A max below the present min wins over it, so that
    `--max 0` always pauses; a min above the present max is refused: it could cost money nobody named."""
    if "min" not in body and "max" not in body:
        raise AdminError(400, "give min, max or both, or reset: true", "invalid_request")
    for name in ("min", "max"):
        value = body.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= SLOTS:
            message = f"{name} is a whole number from 0 to {SLOTS}, not {value!r}"
            raise AdminError(400, message, "invalid_limits", name)
    low, high = body.get("min"), body.get("max", now["max"])
    if low is not None and low > high:
        raise AdminError(400, f"min {low} is more than max {high}: give max too", "invalid_limits", "min")
    return low, body.get("max")


async def _json(request: Request) -> dict[str, Any]:
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise AdminError(413, f"more than {MAX_BODY_BYTES} bytes", "body_too_large")
        chunks.append(chunk)
    try:
        body = json.loads(b"".join(chunks))
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise AdminError(400, 'the body is a JSON object, like {"min": 0, "max": 2}', "invalid_json")
    return body


def _yes(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes")


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) > most:
        message = f"{name} is a whole number from 0 to {most}, not {text!r}"
        raise AdminError(400, message, "invalid_request", name)
    return int(text)


async def _next(events: AsyncIterator[dict[str, Any]]) -> dict[str, Any]:
    return await anext(events)


def _body(
    status: int, message: str, code: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


async def _error(request: Request, error: HTTPException) -> Response:
    if isinstance(error, AdminError):
        return _body(error.status_code, error.detail, error.code, error.param)
    if error.status_code == 405:
        return _body(405, f"{request.method} is not for {request.url.path}", "method_not_allowed")
    return _body(error.status_code, f"{request.url.path}: {error.detail}", "not_found", headers=error.headers)


async def _fault(request: Request, error: Exception) -> Response:
    log.error("fault in %s %s", request.method, request.url.path, exc_info=error)
    return _body(500, "a fault of the gateway's own; its log has the traceback", "internal_error")


if __name__ == "__main__":
    from gateway.assembly import main

    main()
