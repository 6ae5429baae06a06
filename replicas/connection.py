"""One HTTP/1.1 connection of polling.py's: a question, its whole answer, and how much of one is borne."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

import httptools

MAX_HEAD: Final = 64 * 1024  # bytes of status line, headers, interim answers and trailers
MAX_BODY: Final = 1024 * 1024  # bytes, with the framing of its chunks


class PollError(Exception):
    """No answer. The text follows "the replica: "; what caused it is chained; no header is in either."""


class Stale(Exception):
    """The replica had closed the kept connection: no byte of this question was answered."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes


class Connection(asyncio.Protocol):
    """The state is that of the question under way; `_answer` is None between two.

    `whom`: what another question must be for to go on it as well.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, whom: object) -> None:
        self.whom = whom
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._answered_at: float | None = None
        self._reset()

    def __repr__(self) -> str:
        return f"<Connection {'busy' if self._answer else 'idle' if self._transport else 'closed'}>"

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[Answer] | None = None
        self._body: list[bytes] = []
        self._status = self._size = self._head = 0  # `_size` in bytes of all, `_head` of headers
        self._started = self._done = self._framed = False
        self._keep = True

    @property
    def idle(self) -> float:
        """Seconds since its last answer."""
        return 0.0 if self._answered_at is None else self._loop.time() - self._answered_at

    async def ask(self, request: bytes) -> Answer:
        """Raises Stale, PollError, or the OSError that the connection ended with."""
        self._reset()
        if self._transport is None:
            raise self._silent()
        self._answer = self._loop.create_future()
        self._transport.write(request)
        return await self._answer

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _silent(self) -> Exception:
        """Why there is not one byte of an answer."""
        used = self._answered_at is not None
        return Stale() if used else PollError("it closed the connection without an answer")

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a stream transport

    def data_received(self, data: bytes) -> None:
        if self._answer is None:  # it belongs to no question
            self.abort()
            return
        self._size += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep = False
            if not self._done:
                self._fail(PollError(f"its answer is not HTTP: {error}"))
        if self._done:
            self._finish()
        elif self._head > MAX_HEAD or (self._size > MAX_HEAD and not self._started):
            self._fail(PollError(f"its answer has over {MAX_HEAD} bytes of headers"))
        elif self._size > MAX_HEAD + MAX_BODY:
            self._fail(PollError(f"its answer has over {MAX_BODY} bytes"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._started and not self._framed and exc is None:  # a body that ends where the connection does
            self._finish()
        elif self._size:
            self._fail(exc or PollError("it broke off its answer"))
        else:
            self._fail(self._silent() if self._answered_at is not None else exc or self._silent())

    def _finish(self) -> None:
        answer, self._answer = self._answer, None
        self._answered_at = self._loop.time()
        if not self._keep:
            self.abort()
        if answer is not None and not answer.done():
            answer.set_result(Answer(self._status, b"".join(self._body)))

    def _fail(self, error: Exception) -> None:
        answer, self._answer = self._answer, None
        self.abort()
        if answer is not None and not answer.done():
            answer.set_exception(error)

    # --- httptools

    def on_message_begin(self) -> None:
        if self._done:  # bytes past the end
            self._keep = False
        else:
            self._framed = False  # of an interim answer before

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head += len(name) + len(value)
        self._framed = self._framed or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self._done:
            self._status, self._started = status, True

    def on_body(self, body: bytes) -> None:
        if not self._done:
            self._body.append(body)

    def on_message_complete(self) -> None:
        if self._started and not self._done:
            self._done = True
            self._keep = self._keep and bool(self._parser.should_keep_alive())
