"""The answer to one request: what was sent so far, and so what may still be sent.

Until the head is out any honest status is possible. After a **commit** (200 sent by us, before a replica
answered) a stream can still end in an error event, a JSON answer only in a broken connection: an error body
under 200 would be read as an answer by the SDKs, and a clean end of a stream as success.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Protocol

from gateway import openai
from gateway.errors import GatewayError
from gateway.headers import Header

CHUNK_SECONDS = 55.0  # LangChain's stream_chunk_timeout is 120 s and sees chunks only
TAIL = 4096  # bytes kept of a body's end: its last event, end marker and usage


class Sink(Protocol):
    """The client's end of the connection."""

    @property
    def paused(self) -> bool: ...
    def start(self, status: int, headers: list[Header]) -> None: ...
    def write(self, data: bytes) -> None: ...
    def finish(self, data: bytes = b"") -> None: ...
    def break_off(self) -> None: ...


class Reply:
    """Mutable: by the request's `Exchange` and `Attempt`s. Nothing here waits; `Sink.paused` says when to.

    `started`: a head was sent. `committed`: it was ours, before the replica's. `relayed`: bytes of the
    replica's body were sent. `sent_at`: loop time of the last bytes to the client. `beating`: they were a
    beat.
    """

    __slots__ = (
        "_chunk_at", "_client", "_endpoint", "_kept", "_model", "_request_id", "_rid", "_tails",
        "aborted", "beating", "committed", "finished", "relayed", "sent_at", "started", "status",
        "stream",
    )  # fmt: skip

    def __init__(self, client: Sink, endpoint: openai.Endpoint, request_id: str, now: float) -> None:
        self._client = client
        self._endpoint = endpoint
        self._request_id = request_id
        self._model = ""
        self._rid = request_id
        self.stream = False
        self.started = self.committed = self.finished = self.relayed = self.aborted = self.beating = False
        self.status = 0
        self.sent_at = now
        self._tails: list[bytes] = []
        self._kept = 0
        self._chunk_at = 0.0

    def describe(self, *, stream: bool, model: str, rid: str, request_id: str) -> None:
        """What the head and the body say: needed for beats."""
        self.stream = stream
        self._model = model
        self._rid = rid
        self._request_id = request_id

    # --- the replica's bytes

    def start(self, status: int, headers: list[Header]) -> None:
        """Pass on the replica's head."""
        self.started = True
        self.status = status
        self._client.start(status, headers)

    def relay(self, data: bytes, now: float) -> None:
        """Pass on a piece of the replica's body."""
        self.relayed = True
        self.beating = False
        self.sent_at = now
        self._keep(data)
        self._client.write(data)

    def finish(self, data: bytes = b"") -> None:
        """End the response well."""
        if data:
            self.relayed = True
            self._keep(data)
        self._client.finish(data)
        self.finished = True

    def _keep(self, data: bytes) -> None:
        self._tails.append(data)
        self._kept += len(data)
        if self._kept > 4 * TAIL:
            self._tails = [self.tail]
            self._kept = len(self._tails[0])

    @property
    def tail(self) -> bytes:
        """The last bytes of the replica's body that were sent."""
        return b"".join(self._tails)[-TAIL:]

    # --- our own bytes

    def commit(self, now: float, headers: Mapping[str, str]) -> None:
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
        self.start(200, lines)

    @property
    def can_beat(self) -> bool:
        """Whether bytes of ours can be slipped in now."""
        if self._client.paused or self.finished:
            return False
        if self.stream:
            return self.started and self._between_events()
        return self.committed and not self.relayed

    def beat(self, now: float, text: str) -> None:
        """Keep the client: a comment, a ping, a space; every 55 s of a held chat stream an empty chunk."""
        self.sent_at = now
        self.beating = True
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
        self._client.write(data)

    def _between_events(self) -> bool:
        return openai.between_events(b"".join(self._tails[-4:])[-4:])

    def fail(self, error: GatewayError) -> None:
        """Tell the client what went wrong, in the way that is still possible."""
        if self.finished:
            return
        if not self.started:
            self._answer(error)
        elif self.stream and self._between_events():
            self.finished = True
            self._client.finish(openai.error_frame(error, self._endpoint))
        else:
            self.aborted = True
            self._client.break_off()

    def _answer(self, error: GatewayError) -> None:
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
        self.start(error.status, headers)
        self.finished = True
        self._client.finish(body)
