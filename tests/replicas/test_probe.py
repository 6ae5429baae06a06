"""Readiness probes over real sockets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable

import pytest

from replicas.probe import Probed, Prober, ProbeTarget
from replicas.schema import ReadinessProbe


class Replica:
    """An HTTP server that answers every request with `status`, or not at all while that is None."""

    def __init__(self) -> None:
        self.status: int | None = 200
        self.requests: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                self.requests.append(head + await reader.readexactly(int(length[1]) if length else 0))
                if self.status is not None:
                    writer.write(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % self.status)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def replica() -> AsyncIterator[Replica]:
    replica = Replica()
    server = await asyncio.start_server(replica.serve, "127.0.0.1", 0)
    replica.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield replica
    server.close()


class Watch:
    """A prober, and the moment at which its results become what a test waits for."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.changes = 0
        self.prober = Prober(self.changed, clock=lambda: 1000.0)

    def changed(self) -> None:
        self.changes += 1
        self.news.set()

    async def until(self, true: Callable[[Probed], bool]) -> Probed:
        async with asyncio.timeout(10):
            while (found := self.prober.results.get("a")) is None or not true(found):
                self.news.clear()
                await self.news.wait()
        return found


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    watch = Watch()
    yield watch
    await watch.prober.close()


def target(url: str, *, interval: float = 3600.0, key: str | None = None, **probe: object) -> ProbeTarget:
    return ProbeTarget(url, ReadinessProbe(path="/health", **probe), interval, key=key)  # type: ignore[arg-type]


async def test_200_is_ready_and_the_key_is_sent(replica: Replica, watch: Watch) -> None:
    watch.prober.keep({"a": target(replica.url, key="k3y")})
    found = await watch.until(lambda p: p.ok_at == 1000.0)
    assert (found.failures, found.failing_since) == (0, None)
    assert replica.requests[0].startswith(b"GET /health HTTP/1.1")
    assert b"authorization: bearer k3y" in replica.requests[0].lower()


async def test_post_data_and_headers_are_those_of_the_yaml(replica: Replica, watch: Watch) -> None:
    headers = {"authorization": "Token own", "X-A": "b"}
    watch.prober.keep({"a": target(replica.url, key="k3y", post_data={"text": "hi"}, headers=headers)})
    await watch.until(lambda p: p.ok_at is not None)
    (request,) = replica.requests
    assert request.startswith(b"POST /health HTTP/1.1")
    assert request.endswith(b'{"text":"hi"}')
    assert b"Token own" in request
    assert b"\r\nx-a: b\r\n" in request
    assert b"k3y" not in request


@pytest.mark.parametrize("status", [503, 404, 204, 302])
async def test_anything_but_200_is_a_failure(replica: Replica, watch: Watch, status: int) -> None:
    replica.status = status
    watch.prober.keep({"a": target(replica.url)})
    found = await watch.until(lambda p: p.failures == 1)
    assert (found.error, found.turned_away) == (f"HTTP {status}", status == 503)


async def test_a_closed_port_is_a_failure_that_says_so(replica: Replica, watch: Watch) -> None:
    watch.prober.keep({"a": target("http://127.0.0.1:1")})
    found = await watch.until(lambda p: p.failures == 1)
    assert found.failing_since == 1000.0
    assert found.error


async def test_no_answer_in_time_is_a_failure(
    replica: Replica, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.probe.TIMEOUT_LEAST", 0.05)
    replica.status = None
    watch.prober.keep({"a": target(replica.url, timeout_seconds=0.01)})
    assert "no answer" in (await watch.until(lambda p: p.failures == 1)).error


async def test_soon_probes_at_once_and_a_success_ends_the_failures(replica: Replica, watch: Watch) -> None:
    replica.status = 503
    watch.prober.keep({"a": target(replica.url)})
    await watch.until(lambda p: p.failures == 1)
    watch.prober.soon("a")
    await watch.until(lambda p: p.failures == 2)
    replica.status = 200
    watch.prober.soon("a")
    await watch.until(lambda p: p.failures == 0)
    watch.prober.soon("unknown")
    assert watch.changes == 3


async def test_a_replica_that_starts_is_asked_each_second_whatever_the_yaml_says(
    replica: Replica, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.probe.EAGER", 0.01)
    replica.status = 503
    slow = target(replica.url)
    watch.prober.keep({"a": ProbeTarget(slow.url, slow.probe, slow.interval, eager=True)})
    await watch.until(lambda p: p.failures >= 1)
    replica.status = 200
    await watch.until(lambda p: p.ok_at is not None)


async def test_a_replica_that_is_not_kept_is_forgotten(replica: Replica, watch: Watch) -> None:
    watch.prober.keep({"a": target(replica.url)})
    await watch.until(lambda p: p.ok_at is not None)
    watch.prober.keep({})
    assert watch.prober.results == {}
    assert repr(watch.prober) == "<Prober of 0>"
    assert "k3y" not in repr(target(replica.url, key="k3y"))
