"""uvicorn as the workers and the admin port use it: told when to stop, not looking ten times a second.

Its ticks took 1.2 ms of CPU a second of each idle process. What else they are for (the header `date`,
`limit_max_requests`, `callback_notify`) is not used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Final

import uvicorn

# Of the event loop, from a connection's accept until the server knows it (uvloop: 1). uvicorn would not close
# one that is on its way while it stops, and would wait for its end, for as long as a drain may last.
ACCEPTING_TURNS: Final = 3


class Server(uvicorn.Server):
    """`serves` is called once connections are accepted; signals are left to whoever runs it. `should_exit` is
    set in the event loop's thread."""

    def __init__(self, config: uvicorn.Config, serves: Callable[[], None] = lambda: None) -> None:
        self._exit = asyncio.Event()
        config.date_header = False  # nobody would renew it
        super().__init__(config)
        self._serves = serves

    @property
    def should_exit(self) -> bool:
        return self._exit.is_set()

    @should_exit.setter
    def should_exit(self, value: bool) -> None:
        if value:
            self._exit.set()
        else:
            self._exit.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._serves()

    async def main_loop(self) -> None:
        await self.on_tick(0)  # sets the headers that all answers have
        await self._exit.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for _ in range(ACCEPTING_TURNS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
