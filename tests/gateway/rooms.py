"""Waiting rooms for tests: their window, and a clock that is set by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.hold import Place, WaitingRoom
from gateway.upstream import Pool
from gateway.upstreams import Upstream
from replicas.board import Board


async def _replica() -> Upstream:
    url = "http://127.0.0.1:9"
    return Upstream("r1-0", 0, url, window=1, pool=Pool(url))


REPLICA = asyncio.run(_replica())  # a room only passes it on


class Window:
    """The places of one replica, shared by all rooms; `order` is who got one."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.order: list[int] = []

    def take(self, place: Place) -> Upstream | None:
        if self.free <= 0:
            return None
        self.order.append(place.since)
        return REPLICA

    def start(self, upstream: Upstream) -> None:
        self.free -= 1


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time stands still until it is told otherwise."""

    now = 1000.0

    def time(self) -> float:
        return self.now

    resolution = 1e-6  # seconds: of sums of floats

    def settle(self) -> None:
        """Run what is due."""
        for _ in range(3):
            self.run_until_complete(asyncio.sleep(0))


def make_room(
    loop: asyncio.AbstractEventLoop, board: Board, window: Window, *, worker: int = 0, service: int = 0,
    max_waiting: int = 10, max_bytes: int = 1_000_000, on_level: Callable[[], None] = lambda: None,
) -> WaitingRoom:  # fmt: skip
    async def make() -> WaitingRoom:
        room = WaitingRoom(
            board, worker, service, max_waiting=max_waiting, max_bytes=max_bytes,
            take=window.take, start=window.start, on_level=on_level,
        )  # fmt: skip
        room.polls = True
        return room

    return loop.run_until_complete(make())
