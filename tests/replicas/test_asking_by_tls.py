"""Probes and load polls of a replica that speaks TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from replicas.board import Board
from replicas.loads import LoadPoller, LoadTarget
from replicas.probe import Probed, Prober, ProbeTarget
from replicas.schema import ReadinessProbe
from replicas.simulator import SimConfig, Simulator
from replicas.tls import Identity, context_for, make

KEY = "replica-key"


@pytest.fixture(scope="module")
def identity() -> Identity:
    return make("r1")


@pytest.fixture
async def sim(identity: Identity, tmp_path: Path) -> AsyncIterator[Simulator]:
    (tmp_path / "key").write_text(identity.key)
    (tmp_path / "cert").write_text(identity.cert)
    files = {"ssl_keyfile": str(tmp_path / "key"), "ssl_certfile": str(tmp_path / "cert")}
    async with Simulator(SimConfig(api_key=KEY, health_seconds=0.0, max_running=7, **files)) as sim:  # type: ignore[arg-type]
        yield sim


async def probed(url: str, cert: str) -> Probed:
    news = asyncio.Event()
    prober = Prober(news.set)
    context = context_for(url, cert, None)
    target = ProbeTarget(url, ReadinessProbe(path="/health"), 60.0, key=KEY, context=context)
    prober.keep({"a": target})
    async with asyncio.timeout(10):
        await news.wait()
    result = prober.results["a"]
    await prober.close()
    return result


async def test_a_probe_accepts_the_pinned_certificate_alone(sim: Simulator, identity: Identity) -> None:
    assert (await probed(sim.url, identity.cert)).ok_at is not None
    wrong = await probed(sim.url, make("r1").cert)
    assert wrong.ok_at is None
    assert wrong.error == "its certificate is not the one that this gateway gave it"


async def test_a_probe_never_falls_back_to_plain(identity: Identity) -> None:
    async with Simulator(SimConfig(health_seconds=0.0)) as plain:
        result = await probed(plain.url.replace("http://", "https://"), identity.cert)
        assert (result.ok_at, result.error) == (None, "it does not speak TLS")


async def test_a_plain_replica_is_probed_as_ever(identity: Identity) -> None:
    async with Simulator(SimConfig(health_seconds=0.0)) as plain:
        assert (await probed(plain.url, identity.cert)).ok_at is not None


async def test_loads_are_polled_by_tls(sim: Simulator, identity: Identity, tmp_path: Path) -> None:
    news = asyncio.Event()
    with Board.create(tmp_path / "load.board", 1) as board:
        poller = LoadPoller(board, news.set, window_max=64)
        poller.keep({"a": LoadTarget(sim.url, 3, KEY, context_for(sim.url, identity.cert, None))})
        async with asyncio.timeout(10):
            await news.wait()
        assert poller.window("a") == 7
        await poller.close()
