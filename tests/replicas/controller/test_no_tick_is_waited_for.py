"""A start is a chain of events, and none of them waits for a clock: with every period an hour long, a replica
serves as soon as it answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from typing import Any

import pytest

from replicas import controller, evidence, probe
from replicas.lifecycle import State
from replicas.probe import Prober
from replicas.provisioners import Instance, Other

HOUR = 3600.0
SOON = 10.0  # s; of a busy machine, far less than any period


@pytest.fixture(autouse=True)
def _an_hour_between_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "TICK", HOUR)
    monkeypatch.setattr(probe, "EAGER", HOUR)
    monkeypatch.setattr(evidence, "LOOK_WAIT", 0.001)


@pytest.fixture
async def healthy() -> AsyncIterator[str]:
    """The URL of a server that is well."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def serves(world: Any, url: str) -> None:
    """Somebody waits; the controller runs until the workers know a replica."""
    launch = world.provisioner.launch

    async def at_that_url(id: str, *rest: Any) -> None:
        await launch(id, *rest)
        world.provisioner.machines[id] = Instance(id, True, url)

    world.provisioner.launch = at_that_url
    world.prober = Prober(lambda: world.controller.poke(), clock=world.clock)
    world.controller = world.make_controller()
    world.waits(1)
    running = asyncio.create_task(world.controller.run())
    try:
        async with asyncio.timeout(SOON):
            while not world.control.published or not world.info.upstreams:
                world.control.news.clear()
                await world.control.news.wait()
    finally:
        running.cancel()
        await asyncio.wait([running])


async def test_a_replica_that_answers_its_first_probe_serves_at_once(world: Any, healthy: str) -> None:
    await serves(world, healthy)
    assert world.states == [State.READY]


async def test_nor_is_a_tick_waited_for_where_looks_take_longer_than_one(world: Any, healthy: str) -> None:
    instances, looks = world.provisioner.instances, 0

    async def slowly(fresh: Collection[str] = ()) -> dict[str, Instance]:
        nonlocal looks
        looks += 1
        await asyncio.sleep(0.1)
        found: dict[str, Instance] = await instances(fresh)
        return found

    world.provisioner.instances = slowly
    await serves(world, healthy)
    assert looks == 2  # one before the launch, which is under way when the launch ends, and one after it


async def test_what_is_not_ours_may_take_long_to_tell(world: Any, healthy: str) -> None:
    asked = asyncio.Event()

    async def slowly(services: Collection[str]) -> list[Other]:
        asked.set()
        await asyncio.sleep(0.1)
        return []

    world.provisioner.others = slowly
    await serves(world, healthy)
    assert asked.is_set()


async def test_a_launch_that_ends_is_looked_at_and_probed_in_the_tick_that_hears_of_it(world: Any) -> None:
    world.waits(1)
    await world.step()
    assert world.prober.targets == {}
    await world.step(0.0)
    assert list(world.prober.targets) == [world.id(1)]


async def test_one_that_ends_while_a_tick_waits_for_a_look_has_a_look_of_its_own(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "LOOK_WAIT", HOUR)
    provisioner, gate = world.provisioner, asyncio.Event()
    provisioner.gate, instances = gate, provisioner.instances
    world.waits(1)
    await world.step()

    async def before_it_ended(fresh: Collection[str] = ()) -> dict[str, Instance]:
        found: dict[str, Instance] = await instances(fresh)
        gate.set()
        while world.controller._errands:  # noqa: ASYNC110 (one turn of the loop each)
            await asyncio.sleep(0)
        return found

    provisioner.instances = before_it_ended
    await world.step()
    provisioner.instances = instances
    await world.step(0.0)
    assert list(world.prober.targets) == [world.id(1)]


async def test_the_tick_that_hears_of_the_first_good_probe_publishes_the_replica(world: Any) -> None:
    world.waits(1)
    await world.steps(2, 0.0)
    world.prober.answers[world.id(1)] = True
    published = len(world.control.published)
    await world.step(0.0)
    assert [u.id for u in world.info.upstreams] == [world.id(1)]
    assert len(world.control.published) == published + 1


async def test_nothing_is_looked_at_sooner_than_due_while_nothing_begins_or_ends(world: Any) -> None:
    await world.become_ready()
    looked = world.controller._lookout.begun
    await world.steps(9, 0.1)
    assert world.controller._lookout.begun == looked
