"""The client's side of one request: what was sent so far, and so what may still be sent.

Until the head is out any honest status is possible. After a **commit** (200 sent by us, before a replica
answered) a stream can still end in an error event, a JSON answer only in a broken connection: an error body
under 200 would be read as an answer by the SDKs, and a clean end of a stream as success.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway import openai
from gateway.errors import GatewayError
from gateway.headers import Header

Send = Callable[[dict[str, Any]], Awaitable[None]]

CHUNK_SECONDS = 55.0  # LangChain's stream_chunk_timeout is 120 s and sees chunks only


class Reply:
    """Mutable: by the request's one task. `started`: a head was sent. `committed`: it was ours, before the
    replica's. `relayed`: bytes of the replica's body were sent. `tail`: the last of them."""

    __slots__ = (
        "_chunk_at", "_endpoint", "_model", "_request_id", "_rid", "_send", "aborted", "beat_at",
        "committed", "finished", "relayed", "started", "status", "stream", "tail",
    )  # fmt: skip

    def __init__(self, send: Send, endpoint: openai.Endpoint, request_id: str) -> None:
        self._send = send
        self._endpoint = endpoint
        self._request_id = request_id
        self._model = ""
        self._rid = request_id
        self.stream = False
        self.started = self.committed = self.finished = self.relayed = self.aborted = False
        self.status = 0
        self.tail = b""
        self.beat_at = 0.0
        self._chunk_at = 0.0

    def describe(self, *, stream: bool, model: str, rid: str) -> None:
        """What the body says: needed for beats."""
        self.stream = stream
        self._model = model
        self._rid = rid

    async def start(self, status: int, headers: list[Header]) -> None:
        """Pass on the replica's head."""
        self.started = True
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def commit(self, now: float, headers: Mapping[str, str]) -> None:
        """Send 200 before there is an answer. `now` is the loop's time."""
        kind = b"text/event-stream; charset=utf-8" if self.stream else b"application/json"
        lines: list[Header] = [
            (b"content-type", kind),
            (b"x-accel-buffering", b"no"),  # nginx holds beats back otherwise
            (b"cache-control", b"no-cache, no-transform"),  # and gzip would hold all of it to the end
            (b"x-request-id", self._request_id.encode()),
        ]
        lines += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self.committed = True
        self._chunk_at = now
        await self.start(200, lines)

    @property
    def can_beat(self) -> bool:
        """Whether bytes of ours can be slipped in now."""
        if self.stream:
            return self.started and openai.between_events(self.tail)
        return self.committed and not self.relayed

    async def beat(self, now: float, text: str) -> None:
        """Keep the client: a comment, a ping, a space; every 55 s of a held chat stream an empty chunk."""
        self.beat_at = now
        if not self.can_beat:
            return
        if not self.stream:
            data = openai.SPACE
        elif self._endpoint.beats is openai.Beats.PING:
            data = openai.PING
        else:
            data = openai.comment(text)
            if self._endpoint.chunk and not self.relayed and now - self._chunk_at >= CHUNK_SECONDS:
                self._chunk_at = now
                data += openai.empty_chunk(self._endpoint, self._rid, self._model, int(time.time()))
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes = b"") -> None:
        """End the response well. It is not `finished` while a client that does not read holds the end up."""
        await self._send({"type": "http.response.body", "body": data, "more_body": False})
        self.finished = True

    async def fail(
        self, error: GatewayError, before_end: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """Tell the client what went wrong, in the way that is still possible. `before_end` is awaited when
        all of an error answer was sent and before the response ends, with which the connection may close."""
        if self.finished:
            return
        if not self.started:
            await self._answer(error, before_end)
        elif self.stream and openai.between_events(self.tail):
            await self.finish(openai.error_frame(error, self._endpoint))
        else:
            # Ending an ASGI response midway makes the server close the connection without a last chunk.
            self.aborted = True

    async def _answer(
        self, error: GatewayError, before_end: Callable[[], Awaitable[None]] | None
    ) -> None:
        body = openai.error_body(error, self._endpoint)
        headers: list[Header] = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"x-request-id", self._request_id.encode()),
        ]
        headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % error.retry_after))
        if error.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.start(error.status, headers)
        if before_end is not None:
            await self._send({"type": "http.response.body", "body": body, "more_body": True})
            await before_end()
            body = b""
        await self.finish(body)
