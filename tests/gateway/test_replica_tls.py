"""Replicas that speak TLS: the same service, and never by accident without it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from replicas.control import Snapshot, UpstreamInfo
from replicas.simulator import SimConfig, Simulator
from replicas.tls import Identity, make

from .conftest import SERVICE, Rig, chat, eventually

KEY = "replica-key"
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def identity() -> Identity:
    return make("r1")


def config(identity: Identity, folder: Path, **more: object) -> SimConfig:
    """A replica that was given `identity`, as its `run` would put it into files."""
    key, cert = folder / "replica.key", folder / "replica.crt"
    key.write_text(identity.key)
    cert.write_text(identity.cert)
    return SimConfig(api_key=KEY, ssl_keyfile=str(key), ssl_certfile=str(cert), **more)  # type: ignore[arg-type]


@pytest.fixture
async def sim(identity: Identity, tmp_path: Path) -> AsyncIterator[Simulator]:
    async with Simulator(config(identity, tmp_path, max_running=1)) as sim:
        yield sim


async def publish(rig: Rig, cert: str, *replicas: tuple[str, bool], window: int = 64, **more: Any) -> None:
    """The next generation, of (url, pinned) each; every worker has applied it."""
    rig.generation += 1
    upstreams = tuple(
        UpstreamInfo(f"up-{i}", i, url, window, pinned) for i, (url, pinned) in enumerate(replicas)
    )
    info = replace(SERVICE, upstreams=upstreams, replica_key=KEY, replica_cert=cert, **more)
    rig.control.publish(Snapshot(rig.generation, (info,)))
    await rig.acked()


async def test_streams_and_answers_come_through_and_connections_are_kept(
    rig: Rig, sim: Simulator, identity: Identity
) -> None:
    assert sim.url.startswith("https://")
    await publish(rig, identity.cert, (sim.url, True))
    for stream in (False, True, False, True):
        answer = await rig.client.post(PATH, json=chat(max_tokens=5, stream=stream))
        assert answer.status_code == 200, answer.text
        assert ("[DONE]" in answer.text) is stream
    assert len(sim.connections) == 1
    await rig.quiet()


async def test_a_client_that_leaves_is_known_to_the_replica_at_once(
    rig: Rig, sim: Simulator, identity: Identity
) -> None:
    await publish(rig, identity.cert, (sim.url, True))
    first = await rig.raw(chat(max_tokens=100_000, ignore_eos=True, stream=True))
    await first.until(b"data: ")
    queued = await rig.raw(chat(max_tokens=100_000, ignore_eos=True))
    await eventually(lambda: sim.stats.queued == 1)
    await queued.close()
    await eventually(lambda: len(sim.stats.abort_calls) == 1 and sim.stats.queued == 0)  # /abort_request
    await first.close()
    await eventually(lambda: sim.stats.running == 0)
    await rig.quiet()


async def test_an_idle_connection_that_the_replica_closed_costs_no_request(
    rig: Rig, sim: Simulator, identity: Identity
) -> None:
    await publish(rig, identity.cert, (sim.url, True))
    assert (await rig.client.post(PATH, json=chat(max_tokens=2))).status_code == 200
    (connection,) = sim.connections
    connection.cut()
    assert (await rig.client.post(PATH, json=chat(max_tokens=2))).status_code == 200
    assert connection not in sim.connections
    assert sim.stats.runs_total == 2


async def test_another_certificate_is_a_502_that_says_so_and_the_controller_hears_of_it(
    rig: Rig, identity: Identity, tmp_path: Path
) -> None:
    async with Simulator(config(make("r1"), tmp_path)) as impostor:
        await publish(rig, identity.cert, (impostor.url, True))
        answer = await rig.client.post(PATH, json=chat(max_tokens=2))
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "replica_unreachable")
        assert "its certificate is not the one that this gateway gave it" in error["message"]
        assert impostor.stats.runs_total == 0
        await eventually(lambda: dict(rig.control.workers[0].suspects).get("up-0"))


async def test_a_server_with_a_certificate_of_its_own_is_verified_by_the_authority_given(
    rig: Rig, sim: Simulator, identity: Identity
) -> None:
    await publish(rig, make("other").cert, (sim.url, False), replica_ca=identity.cert)
    assert (await rig.client.post(PATH, json=chat(max_tokens=2))).status_code == 200


async def test_plain_replicas_and_pinned_ones_serve_side_by_side(
    rig: Rig, sim: Simulator, identity: Identity
) -> None:
    async with Simulator(SimConfig(api_key=KEY)) as plain:
        await publish(rig, identity.cert, (sim.url, True), (plain.url, False), window=1)
        first = await rig.raw(chat(max_tokens=100_000, ignore_eos=True, stream=True))
        await first.until(b"data: ")
        second = await rig.raw(chat(max_tokens=100_000, ignore_eos=True, stream=True))
        await second.until(b"data: ")
        assert (sim.stats.running, plain.stats.running) == (1, 1)
        await first.close()
        await second.close()
        await rig.quiet()


def test_no_certificate_is_in_what_a_worker_might_log(identity: Identity) -> None:
    info = replace(SERVICE, replica_key=KEY, replica_cert=identity.cert)
    said = repr(Snapshot(1, (info,)))
    assert KEY not in said
    assert "CERTIFICATE" not in said
