"""Connections that nobody uses: what each costs, and that they keep nobody out. Linux's /proc tells."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.processes import raise_file_limit

from .conftest import eventually
from .test_worker_process import post
from .worker_process import Gateway

# 10,000 with SKYGATE_IDLE=10000: 10 s, and as many descriptors in two processes.
IDLE = int(os.environ.get("SKYGATE_IDLE", "2000"))
MOST_KIB_EACH = 12.0
ANSWER_SECONDS = 0.05


@pytest.fixture
def many_files() -> Iterator[None]:
    """As the supervisor does for its children."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    raise_file_limit()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < IDLE + 500:
        pytest.skip(f"no {IDLE} descriptors for one process here")
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
async def test_idle_connections_cost_little_and_a_new_request_is_answered_at_once(
    tmp_path: Path, many_files: None
) -> None:
    async with Gateway(tmp_path) as gateway:
        await gateway.listen()
        await gateway.publish(status="blocked", message="no")  # an answer of the gateway's own: 503
        pid = gateway.processes[0].process.pid
        port = int(gateway.processes[0].url.rsplit(":", 1)[1])

        async def ask() -> float:
            began = time.monotonic()
            answer = await gateway.raw(0, post({"messages": [{"role": "user", "content": "hi"}]}))
            await answer.until(b"launch_blocked")
            seconds = time.monotonic() - began
            await answer.close()
            return seconds

        for _ in range(20):
            await ask()
        before, files = resident_kib(pid), descriptors(pid)
        idle: list[socket.socket] = []
        try:
            for _ in range(IDLE):
                idle.append(socket.create_connection(("127.0.0.1", port)))
                if len(idle) % 500 == 0:
                    await eventually(lambda: descriptors(pid) > files + len(idle) - 10, seconds=30)
            each = (resident_kib(pid) - before) / IDLE
            times = [await ask() for _ in range(21)]
        finally:
            for sock in idle:
                sock.close()
        await eventually(lambda: descriptors(pid) < files + 10, seconds=30)
        assert await asyncio.wait_for(ask(), 10) > 0
    median = statistics.median(times)
    print(f"{IDLE} idle connections: {each:.1f} KiB each; a request beside them {median * 1000:.1f} ms")
    assert each < MOST_KIB_EACH
    assert min(times) < ANSWER_SECONDS
