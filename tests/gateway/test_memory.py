"""What an ended request leaves behind: nothing that only the garbage collector would find."""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from gateway.proxy import Exchange
from replicas.simulator import SimConfig, Simulator

from .conftest import Rig, chat, eventually

Rigs = Callable[..., Awaitable[Rig]]


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # what was there before need not be looked through
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


def alive() -> int:
    """Requests that are still in memory; a held one costs its whole body."""
    return sum(isinstance(thing, Exchange) for thing in gc.get_objects())


async def ask(rig: Rig, **body: Any) -> int:
    async with rig.client.stream("POST", "/v1/chat/completions", json=chat(**body)) as answer:
        await answer.aread()
        return answer.status_code


async def test_nothing_of_one_that_was_answered(rig: Rig) -> None:
    async with Simulator(SimConfig()) as sim:
        rig.publish(sim.url)
        await rig.acked()
        for stream in (False, True, False, True):
            assert await ask(rig, stream=stream, max_tokens=2) == 200
        assert await ask(rig, n=0) == 400
        await eventually(lambda: alive() == 0)


async def test_nothing_of_one_that_was_held_and_left(rigs: Rigs) -> None:
    rig = await rigs(commit_after=0.0)
    held = [await rig.raw(chat(stream=stream)) for stream in (False, True)]
    await rig.waiting(2)
    assert alive() == 2
    for answer in held:
        await answer.close()
    await rig.quiet()
    await eventually(lambda: alive() == 0)


@pytest.mark.parametrize("commit_after", [0.0, 600.0])
async def test_nothing_of_one_whose_cold_start_failed(rigs: Rigs, commit_after: float) -> None:
    rig = await rigs(commit_after=commit_after)
    held = [await rig.raw(chat(stream=stream)) for stream in (False, True)]
    await rig.waiting(2)
    rig.publish(status="blocked", message="no")
    for answer in held:
        await answer.rest()
        await answer.close()
    await eventually(lambda: alive() == 0)


async def test_nothing_of_one_whose_replica_died(rig: Rig) -> None:
    async with Simulator(SimConfig(faults=("drop=9",))) as sim:
        rig.publish(sim.url)
        await rig.acked()
        assert await ask(rig) == 502
        await rig.quiet()
    await eventually(lambda: alive() == 0)
