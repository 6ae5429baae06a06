"""A gateway's admin port without a gateway: a controller that the test sets up, on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from gateway.admin import Admin
from gateway.metrics import build_registry
from replicas.costs import Entry, bill, moment

REPLICA: dict[str, Any] = {
    "id": "svc-gw-0a1b2c3d-1",
    "state": "starting",
    "phase": "load",
    "progress": 0.62,
    "eta_seconds": 410,
    "since": 1_700_000_000.0,
    "url": None,
    "in_flight": 0,
    "queue_depth": None,
    "window": 16,
    "hourly_cost": 2.5,
    "outdated": False,
    "reason": "3 requests wait and no replica exists",
}
SERVICE: dict[str, Any] = {
    "name": "svc",
    "model": "org/model",
    "limits": {"min": 0, "max": 2, "override": False},
    "target": {"replicas": 1, "reason": "3 requests wait"},
    "blocked": None,
    "demand": {"waiting": 3, "in_flight": 0},
    "replicas": [REPLICA],
    "cost": {"hourly": 2.5, "total": 1.25},
}


class FakeController:
    """Remembers what it is asked. `down_gate` holds `down()` until set; `feed` is what `events()` yields."""

    def __init__(self) -> None:
        self.service = copy.deepcopy(SERVICE)
        self.calls: list[tuple[Any, ...]] = []
        self.down_gate = asyncio.Event()
        self.down_error: Exception | None = None
        self.feed: list[dict[str, Any]] = [{"type": "decision", "reason": "first"}]
        self.broken = False

    def status(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("a fault")
        return {"generation": 7, "owner": "0a1b2c3d", "services": [self.service]}

    def set_limits(self, name: str, min: int | None = None, max: int | None = None) -> None:
        self.calls.append(("set_limits", name, min, max))
        new = {key: value for key, value in (("min", min), ("max", max)) if value is not None}
        self.service["limits"] |= new | {"override": True}

    def reset_limits(self, name: str) -> None:
        self.calls.append(("reset_limits", name))
        self.service["limits"] = {"min": 0, "max": 2, "override": False}

    def cost(self, since: str | None = None, by: str = "day") -> dict[str, Any]:
        self.calls.append(("cost", since, by))
        entry = Entry(
            "svc-gw-0a1b2c3d-1", "svc", 1.7e9, 1.7e9 + 7200, price=2.5, dollars=5.0, plan="H200:8x1 spot",
            spot=True, key="alice", request="req-1", closed=True,
        )  # fmt: skip
        return bill([entry], by, 1.7e9 + 9000, None if since is None else moment(since, 1.7e9 + 9000))

    def retry(self, name: str) -> None:
        self.calls.append(("retry", name))

    async def down(self) -> list[str]:
        self.calls.append(("down",))
        await self.down_gate.wait()
        if self.down_error is not None:
            raise self.down_error
        self.service["replicas"] = []
        return []

    async def events(self, last: int = 0) -> AsyncIterator[dict[str, Any]]:
        for event in self.feed:
            yield event
        await asyncio.Event().wait()


@pytest.fixture
def controller() -> FakeController:
    return FakeController()


@pytest.fixture
def admin(controller: FakeController, tmp_path: Path) -> Admin:
    return Admin(controller, tmp_path, lambda status: build_registry(None, status), {"version": "0"})


class AdminPort:
    """The app on 127.0.0.1, served by uvicorn in a thread: the CLI is a blocking program."""

    def __init__(self, admin: Admin, key: str | None) -> None:
        self.admin = admin
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        config = uvicorn.Config(
            admin.app(key), lifespan="off", log_level="error", timeout_graceful_shutdown=1, ws="none"
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        async def main() -> None:
            await self.server.serve(sockets=[self.listener])

        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(main())

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(timeout=10)
        self.listener.close()


@pytest.fixture
def port(admin: Admin) -> Iterator[AdminPort]:
    running = AdminPort(admin, None)
    running.thread.start()
    yield running
    running.stop()
