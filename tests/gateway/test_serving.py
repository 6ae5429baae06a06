"""The main loop of a worker's and the admin port's server: it sleeps until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop

from gateway.app import serve
from gateway.child import Child
from gateway.serving import Server
from gateway.settings import make as make_settings


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


class Counting(Server):
    ticks = 0

    async def on_tick(self, counter: int) -> bool:
        self.ticks += 1
        return await super().on_tick(counter)


def make(**settings: Any) -> Counting:
    return Counting(uvicorn.Config(app, lifespan="off", log_level="error", ws="none", **settings))


async def turns(n: int) -> None:
    for _ in range(n):
        await asyncio.sleep(0)


async def test_it_stops_within_three_turns_of_the_event_loop() -> None:
    server = make()
    serving = asyncio.create_task(server.main_loop())
    await turns(3)
    assert (server.should_exit, serving.done()) == (False, False)
    server.should_exit = True
    await turns(3)
    assert serving.done()
    await serving


async def test_it_stops_at_once_that_was_told_to_before_it_began() -> None:
    server = make()
    server.should_exit = True
    await server.main_loop()
    assert server.ticks == 1


async def test_nothing_wakes_it() -> None:
    server = make(server_header=False, headers=[("x-kept", "yes")])
    server.config.load()
    serving = asyncio.create_task(server.main_loop())
    await asyncio.sleep(0.25)  # uvicorn's own would have ticked three times
    assert server.ticks == 1
    assert server.server_state.default_headers == [(b"x-kept", b"yes")]
    server.should_exit = True
    await serving


async def test_an_answer_has_no_date_as_it_would_be_an_old_one() -> None:
    called = asyncio.Event()
    server = make()
    server._serves = called.set
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait_for(called.wait(), 5)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            answer = await client.get("/")
        assert (answer.status_code, answer.headers.get("date")) == (200, None)
        server.should_exit = True
        await serving


@pytest.mark.parametrize("before", range(6))
def test_a_connection_accepted_in_the_turn_of_the_stop_is_closed_with_the_others(before: int) -> None:
    """On the event loop that a worker has."""

    async def stop_as_one_comes() -> None:
        called = asyncio.Event()
        server = make(timeout_keep_alive=75)
        server._serves = called.set
        with socket.create_server(("127.0.0.1", 0)) as listener:
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            await called.wait()
            await turns(3)
            with socket.create_connection(listener.getsockname()):
                await turns(before)
                server.should_exit = True
                await asyncio.wait_for(serving, 5)

    uvloop.run(stop_as_one_comes())


async def test_a_worker_that_is_told_to_stop_in_the_turn_in_which_its_start_ends_does_not_serve(
    tmp_path: Path,
) -> None:
    settings = make_settings(state_dir=tmp_path)
    loop: Any = asyncio.get_running_loop()

    class Starting:
        closed = False

        def __init__(self) -> None:
            self.settings = settings

        async def start(self) -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.call_soon(loop._signal_handlers[number]._run)

        async def close(self) -> None:
            self.closed = True

        def reload(self, settings: Any) -> None: ...

    worker: Any = Starting()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with asyncio.timeout(5):
            await serve(worker, listener, Child(settings, 0, None, -1, -1))
    loop.remove_signal_handler(signal.SIGHUP)
    assert worker.closed
