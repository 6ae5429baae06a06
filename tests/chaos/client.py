"""The requests and their client: raw HTTP/1.1 on asyncio, because 100,000 of them are to cost little.

Each request's `Outcome` is what its client saw, whatever the gateway says of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from dataclasses import dataclass
from typing import Any, cast

import httptools

from replicas.simulator.reply import Reply

REPLICAS = ("alpha", "beta", "gamma")
PATIENCE = 60.0  # seconds until a request counts as stuck
IDLE = 0.5  # seconds that a connection is kept for the next request
KINDS = ("short", "streaming", "cancelled")
WEIGHTS = (4, 4, 2)
OUTCOMES = ("complete", "error", "broken", "left", "stuck", "false")

_TEXTS = {name: Reply.make(f"{name} says: " + " ".join(f"{name[0]}{i}" for i in range(60)), reasoning=False)
          for name in REPLICAS}  # fmt: skip
_END = b"data: [DONE]\n\n"
_DATA = re.compile(rb"^data: (.*)$", re.MULTILINE)


def reply_text(name: str) -> str:
    """What this replica says (`--reply`): its own text, so that an answer tells where it comes from."""
    reply = _TEXTS[name]
    return reply.text(0, len(reply))


@dataclass(slots=True)
class Ask:
    """One request. `leave`: how the client goes away: seconds after sending, or -1 within the request, or
    None; `leave_bytes`: after so many bytes of the body."""

    marker: str
    kind: str
    stream: bool
    tokens: int
    leave: float | None = None
    leave_bytes: int | None = None
    reset: bool = False  # leaves by RST, not FIN
    fresh: bool = False  # on a connection of its own

    @classmethod
    def make(cls, number: int, seed: int) -> Ask:
        """Request `number` of the run with this seed: always the same."""
        rng = random.Random(f"{seed}/{number}")
        kind = rng.choices(KINDS, WEIGHTS)[0]
        stream = kind == "streaming" or (kind == "cancelled" and rng.random() < 0.6)
        ask = cls(f"r{number}", kind, stream, rng.randint(1, 4) if kind == "short" else rng.randint(4, 40))
        ask.fresh = rng.random() < 0.3
        if kind == "cancelled":
            ask.reset = rng.random() < 0.5
            phase = rng.randrange(4)
            if phase == 0:
                ask.leave = -1.0
            elif phase == 1:
                ask.leave = 0.0
            elif phase == 2 or not stream:
                ask.leave = rng.uniform(0.0, 0.05)
            else:
                ask.leave_bytes = rng.randint(1, 4000)
        return ask

    def request(self) -> bytes:
        body = json.dumps(
            {
                "model": "m",
                "messages": [{"role": "user", "content": "hi"}],
                "user": self.marker,
                "max_tokens": self.tokens,
                "ignore_eos": True,
                "stream": self.stream,
            }
        ).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (self.marker.encode(), len(body)) + body
        )


@dataclass(slots=True)
class Outcome:
    """What the client saw. `what`: one of OUTCOMES; `seen`: bytes of a response came; `first_ns`: when the
    first of a replica's body came (CLOCK_MONOTONIC); `source`: which replica's text it was."""

    ask: Ask
    what: str
    why: str = ""
    status: int = 0
    seen: bool = False
    first_ns: int = 0
    source: str = ""
    held: bool = False  # sent while no replica lived
    sent_ns: int = 0


class Wire(asyncio.Protocol):
    """One connection to the gateway; one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self.lost = False
        self.idle_since = 0.0
        self.ask: Ask | None = None

    def begin(self, ask: Ask) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.ask = ask
        self.body: list[bytes] = []
        self.size = self.status = self.first_ns = 0
        self.seen = self.complete = self.left = False
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def leave(self) -> None:
        """The client goes away, unless its answer is there already."""
        if not self.over.done():
            self.left = True
            self._end()
        self.close(reset=self.ask is not None and self.ask.reset)

    def close(self, *, reset: bool = False) -> None:
        if self._transport is not None:
            self._transport.abort() if reset else self._transport.close()

    @property
    def reusable(self) -> bool:
        return not self.lost and self.complete and bool(self._parser.should_keep_alive())

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.ask is None or self.over.done():
            return  # it has left
        self.seen = True
        self._parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost, self._transport = True, None
        if self.ask is not None:
            self._end()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, data: bytes) -> None:
        if not self.first_ns and b'"choices"' in data:
            self.first_ns = time.monotonic_ns()
        self.body.append(data)
        self.size += len(data)
        if self.ask is not None and self.ask.leave_bytes is not None and self.size >= self.ask.leave_bytes:
            self.leave()

    def on_message_complete(self) -> None:
        self.complete = True
        self._end()


class Client:
    """Sends requests to one gateway and judges the answers. `stuck` ones are given PATIENCE."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._idle: list[Wire] = []

    async def ask(self, ask: Ask, *, held: bool = False) -> Outcome:
        """One request, to its outcome. Raises nothing."""
        loop = asyncio.get_running_loop()
        try:
            wire = await self._wire(ask)
        except OSError as error:
            return Outcome(ask, "broken", f"no connection: {error}", held=held)
        wire.begin(ask)
        sent = time.monotonic_ns()
        data = ask.request()
        timer: asyncio.TimerHandle | None = None
        if ask.leave is not None and ask.leave < 0:
            wire.send(data[: len(data) * 2 // 3])
            timer = loop.call_later(0.002, wire.leave)
        else:
            wire.send(data)
            if ask.leave is not None:
                timer = loop.call_later(ask.leave, wire.leave) if ask.leave else loop.call_soon(wire.leave)  # type: ignore[assignment]
        if wire.lost:
            wire.connection_lost(None)
        try:
            async with asyncio.timeout(PATIENCE):
                await wire.over
            outcome = judge(ask, wire)
        except TimeoutError:
            outcome = Outcome(ask, "stuck", f"nothing more in {PATIENCE:g} s", wire.status, wire.seen)
        if timer is not None:
            timer.cancel()
        outcome.held, outcome.sent_ns = held, sent
        wire.ask = None
        if outcome.what != "left" and wire.reusable and not ask.fresh:
            wire.idle_since = loop.time()
            self._idle.append(wire)
        else:
            wire.close(reset=ask.reset)
        return outcome

    async def _wire(self, ask: Ask) -> Wire:
        loop = asyncio.get_running_loop()
        while self._idle and not ask.fresh:
            wire = self._idle.pop()
            if not wire.lost and loop.time() - wire.idle_since < IDLE:
                return wire
            wire.close()
        _, wire = await loop.create_connection(Wire, self._host, self._port)
        return wire

    def close(self) -> None:
        """Close the idle connections."""
        for wire in self._idle:
            wire.close()
        self._idle.clear()


def judge(ask: Ask, wire: Wire) -> Outcome:
    """What the client makes of what it got."""
    outcome = Outcome(ask, "left", "", wire.status, wire.seen, wire.first_ns)
    body = b"".join(wire.body)
    if wire.left:
        return outcome
    if not wire.complete:
        outcome.what, outcome.why = "broken", "cut within the answer" if wire.seen else "cut before a byte"
    elif wire.status >= 400:
        outcome.what, outcome.why = "error", _code(body)
    else:
        outcome.what, outcome.why, outcome.source = _stream(ask, body) if ask.stream else _plain(ask, body)
    return outcome


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return f"not an error body: {body[:80]!r}"


def _stream(ask: Ask, body: bytes) -> tuple[str, str, str]:
    events = [data for data in _DATA.findall(body) if data != b"[DONE]"]
    try:
        parsed: list[dict[str, Any]] = [json.loads(data) for data in events]
    except ValueError:
        return "false", f"an event that is not JSON: {body[-120:]!r}", ""
    error = next((event["error"] for event in parsed if "error" in event), None)
    done = body.count(_END)
    if error is not None:
        if done:
            return "false", "an error event and then the end marker", ""
        return "error", f"event {error.get('code')}", ""
    if done != 1 or not body.endswith(_END):
        return "false", f"a clean end with {done} end markers: {body[-120:]!r}", ""
    choices = [choice for event in parsed for choice in event.get("choices", ())]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    finish = [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]
    return _complete(ask, text, finish)


def _plain(ask: Ask, body: bytes) -> tuple[str, str, str]:
    try:
        choice = json.loads(body)["choices"][0]
        return _complete(ask, choice["message"]["content"], [choice["finish_reason"]])
    except (ValueError, LookupError, TypeError):
        return "false", f"200, and no answer: {body[-120:]!r}", ""


def _complete(ask: Ask, text: str, finish: list[str]) -> tuple[str, str, str]:
    source = text.partition(" ")[0]
    reply = _TEXTS.get(source) or next((_TEXTS[n] for n in REPLICAS if n.startswith(text)), None)
    if reply is None or text != reply.text(0, ask.tokens) or finish != ["length"]:
        return "false", f"{ask.tokens} tokens wanted, finish {finish}: {text[-120:]!r}", source
    return "complete", "", next(name for name, known in _TEXTS.items() if known is reply)
