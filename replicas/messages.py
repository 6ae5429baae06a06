"""What the controller and the workers say to each other: newline-delimited JSON over the control socket.

Everything is a level ("3 waiting"), never an edge, so that a message may be dropped for a newer one, and a
reconnect repairs everything by sending all of it again:

    controller -> worker   {"type": "snapshot", "generation": 7, "services": [...]}
                           {"type": "progress", "service": "r1", "cold": {...} | null}      (no generation)
    worker -> controller   {"type": "state", "protocol": 1, "worker": 0, "pid": 4711, "generation": 7,
                            "waiting": {"r1": 3}, "suspects": {"r1-gw-0a1b2c3d-4": "connection refused"},
                            "woken": {"r1": ["alice", "req-1"]}}
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any, Literal

PROTOCOL = 1
MAX_LINE = 4 * 1024 * 1024
"""Longest message, bytes. 64 upstreams and 16 services with long causes are some 50 KB."""
MAX_SUSPECTS = 64

Status = Literal["open", "paused", "blocked", "stopping"]
_STATUSES = ("open", "paused", "blocked", "stopping")


class ProtocolError(Exception):
    """The peer said something that is not in the protocol: its connection is dropped, nothing else."""


@dataclass(frozen=True, slots=True)
class UpstreamInfo:
    """A replica that may receive traffic: its board slot, and how many requests it is given at a time.

    `pinned`: it answers with the service's `replica_cert` and is to be refused with any other.
    """

    id: str
    slot: int
    url: str
    window: int
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Where the furthest starting replica is: `progress` 0..1 of its phase; None = not known.

    `plan` ("2/3", which of how many) and `attempt` (1 is the first) while it looks for a machine.
    """

    replica: str
    phase: str | None
    progress: float | None
    eta_seconds: float | None
    detail: str = ""
    plan: str = ""
    attempt: int = 0


@dataclass(frozen=True, slots=True)
class ServiceInfo:
    """What a worker knows of one service; `index` is its row on the board.

    "blocked": while no replica can serve, requests held and new end with `message` (503 `code`, `retry_after`
    seconds). "paused": limited to zero replicas. "stopping": the gateway goes down.
    """

    name: str
    index: int
    model: str
    status: Status
    code: str
    message: str
    retry_after: int
    upstreams: tuple[UpstreamInfo, ...]
    state: str
    hold_max_seconds: float
    upstream_timeout: float | None
    replica_key: str | None = field(repr=False)  # a secret: not for logs
    cold: ColdStart | None
    replica_cert: str | None = field(default=None, repr=False)  # PEM, of pinned upstreams
    replica_ca: str | None = field(default=None, repr=False)  # PEM, for other https:// ones


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a worker needs to serve. `generation` only grows, over restarts of the controller too."""

    generation: int
    services: tuple[ServiceInfo, ...]


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a connected worker said last. `generation` is the one it acked on this connection, 0 = none yet.

    `suspects` are (replica id, reason) pairs: replicas that refused a connection, until `take_suspects`.
    `woken`: by service where somebody waits, the name of the API key and the id of the request that came when
    nobody did. It may be left out: a worker of an older gateway does not say it.
    """

    index: int
    pid: int
    generation: int
    waiting: dict[str, int]
    suspects: tuple[tuple[str, str], ...] = ()
    woken: dict[str, tuple[str, str]] = field(default_factory=dict)


def line(message: dict[str, Any]) -> bytes:
    data = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(data) > MAX_LINE:
        raise ValueError(f"a control message of {len(data)} bytes is over the limit of {MAX_LINE}")
    return data


def parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not JSON: {line[:80]!r}") from error
    if not isinstance(message, dict):
        raise ProtocolError(f"not an object: {line[:80]!r}")
    return message


async def read(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message; None at the end of the stream, where half a line counts as nothing said."""
    try:
        line = await reader.readline()
    except ValueError as error:  # StreamReader's limit
        raise ProtocolError(f"a line is longer than {MAX_LINE} bytes") from error
    except ConnectionError:
        return None
    return parse(line) if line.endswith(b"\n") else None


def decode_cold(value: Any) -> ColdStart | None:
    try:
        return None if value is None else ColdStart(**value)
    except TypeError as error:
        raise ProtocolError(f"not a cold start: {error}") from error


def decode_snapshot(message: dict[str, Any]) -> Snapshot:
    try:
        services = tuple(
            ServiceInfo(
                **{
                    **service,
                    "upstreams": tuple(UpstreamInfo(**upstream) for upstream in service["upstreams"]),
                    "cold": decode_cold(service["cold"]),
                }
            )
            for service in message["services"]
        )
    except (KeyError, TypeError) as error:
        raise ProtocolError(f"not a snapshot: {error}") from error
    if any(service.status not in _STATUSES for service in services):
        raise ProtocolError("not a snapshot: unknown status")
    return Snapshot(_natural(message, "generation"), services)


def decode_state(message: dict[str, Any]) -> WorkerState:
    if message.get("type") != "state":
        raise ProtocolError(f"unexpected message type {message.get('type')!r}")
    if message.get("protocol") != PROTOCOL:
        raise ProtocolError(f"it speaks version {message.get('protocol')!r}, this controller {PROTOCOL}")
    waiting, suspects = message.get("waiting"), message.get("suspects")
    if not isinstance(waiting, dict) or not isinstance(suspects, dict) or len(suspects) > MAX_SUSPECTS:
        raise ProtocolError("waiting and suspects must be objects")
    if not all(isinstance(reason, str) for reason in suspects.values()):
        raise ProtocolError("a suspect's reason must be a string")
    return WorkerState(
        index=_natural(message, "worker"),
        pid=_natural(message, "pid"),
        generation=_natural(message, "generation"),
        waiting={name: _natural(waiting, name) for name in waiting},
        suspects=tuple(suspects.items()),
        woken=_woken(message.get("woken", {})),
    )


def _woken(value: Any) -> dict[str, tuple[str, str]]:
    pairs = list(value.values()) if isinstance(value, dict) else None
    if pairs is None or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ProtocolError("woken must hold pairs of a key's name and a request's id")
    return {service: (key, request) for service, (key, request) in value.items()}


def _natural(message: dict[str, Any], key: str) -> int:
    value = message.get(key)
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{key} must be a whole number >= 0, not {value!r}")
    return value
