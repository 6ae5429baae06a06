"""kill -9 of the gateway, and of SkyPilot's API server, at every point of a replica's life.

The points are found, not chosen: a life without a kill is watched for each commit of state.db and each call
that changes something in SkyPilot; then the gateway is killed before and after each of them. The next one
must end up with exactly the clusters wanted: none twice, none forgotten. A run of the tests ends with the
table.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from replicas.lifecycle import State

from .conftest import ADDRESS, Killed


class Story:
    """From zero to one replica that serves a request, and to zero again; whoever is killed, it is told on."""

    def __init__(self, world: Any) -> None:
        self.world = world
        self.kills = 0

    async def tell(self, steps: int, act: Callable[[], None] = lambda: None, until: Any = None) -> None:
        world = self.world
        for _ in range(steps):
            if until is not None and until():
                return
            try:
                act()
                await world.step()
            except Killed:
                pass
            if world.life.over:
                self.revive()
        assert until is None or until(), world.controller

    def revive(self) -> None:
        self.kills += 1
        self.world.killed_at = self.world.life.touches[-1]
        self.world.start()

    async def up(self) -> None:
        world, sky = self.world, self.world.sky
        sky.may_finish.clear()
        sky.exposed = {}
        await self.tell(3, lambda: world.waits(1))  # decided, saved, submitted: it provisions
        await self.middle()
        sky.may_finish.set()
        await self.tell(2)  # up, no endpoint yet
        sky.exposed = {30000: ADDRESS}
        world.loading = True
        await self.tell(2)  # an endpoint, no answer yet
        world.loading = False
        await self.tell(60, until=lambda: world.states == [State.READY])

    async def middle(self) -> None:
        """While it provisions."""

    def serves_once(self) -> None:
        """Exactly what is wanted exists."""
        world = self.world
        (r,) = world.replicas
        assert r.state is State.READY
        assert world.sky.machines == {r.id}
        assert world.sky.clusters.keys() == {r.id}
        assert world.sky.jobs(r.id) == 1

    async def down(self) -> None:
        world = self.world
        (id,) = (r.id for r in world.replicas)
        world.waits(0)
        world.lease(id)
        await self.tell(3, self.pause)  # drains
        world.release(id)
        await self.tell(60, until=lambda: not world.replicas)

    def pause(self) -> None:
        if self.world.service_status["limits"]["max"] != 0:
            self.world.controller.set_limits("r1", max=0)

    def nothing_left(self) -> None:
        sky = self.world.sky
        assert (sky.machines, sky.clusters) == (set(), {})
        assert all(sky.jobs(name) <= 1 for name in set(self.world.launched))


def unheard(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a killed gateway's tasks had to say."""
    if not isinstance(context.get("exception"), Killed):
        loop.default_exception_handler(context)


async def life(world: Any, kill_at: int | None) -> Story:
    asyncio.get_running_loop().set_exception_handler(unheard)
    story = Story(world)
    try:
        world.start(kill_at=kill_at)
    except Killed:
        story.revive()
    await story.up()
    story.serves_once()
    await story.down()
    story.nothing_left()
    return story


async def test_killed_before_and_after_each_saved_step(
    make_world: Any, record_property: Callable[[str, object], None]
) -> None:
    whole = make_world()
    await life(whole, None)
    points = whole.life.touches
    rows, missed = [], 0
    for n, point in enumerate(points, start=1):
        world = make_world()
        try:
            story = await life(world, n)
        except AssertionError as error:
            raise AssertionError(f"killed {n}: {point}: {error}") from error
        finally:
            world.end()
        if story.kills == 0:  # two threads came in another order, and this life had fewer points
            missed += 1
            continue
        point = world.killed_at
        submitted = sum(world.sky.jobs(name) for name in set(world.launched))
        left = len(world.sky.machines)
        rows.append((n, point, len(world.launched), submitted, len(set(world.sky.downed)), left))
    assert len(rows) >= 30
    assert missed <= 2
    lines = [f"killed at {'':<56} launches  run submitted  downed  left"]
    for n, point, launches, submitted, downed, left in rows:
        lines.append(f"{n:>3} {point:<62} {launches:>8} {submitted:>14} {downed:>7} {left:>5}")
    record_property("table", "\n".join(lines))


class ServerDies(Story):
    """The API server's processes are killed while a launch is under way, and it comes back a while later."""

    gateway_too = False
    made: str = "machines"

    async def middle(self) -> None:
        world, sky = self.world, self.world.sky
        (id,) = (r.id for r in world.replicas)
        sky.api_down = True
        await self.tell(3, lambda: world.waits(1))
        if self.gateway_too:
            world.life.over = True
            self.revive()
            await self.tell(3)
        sky.restart()
        if self.made == "nothing":
            sky.clusters.pop(id)
            sky.machines.discard(id)
        elif self.made == "a refresh calls it up":  # the machines run, and nothing on them
            sky.clusters[id].become("UP")
        sky.api_down = False
        await self.tell(3)


@pytest.mark.parametrize("gateway_too", [False, True], ids=["alone", "and the gateway"])
@pytest.mark.parametrize("made", ["machines", "nothing", "a refresh calls it up"])
async def test_the_api_server_killed_in_the_middle_of_a_launch(
    world: Any, made: str, gateway_too: bool
) -> None:
    story = ServerDies(world)
    story.made, story.gateway_too = made, gateway_too
    await story.up()
    story.serves_once()
    await story.down()
    story.nothing_left()


async def test_a_launch_whose_answer_is_lost_is_found_and_not_made_twice(world: Any) -> None:
    world.sky.answers_lost = 1
    story = Story(world)
    await story.up()
    story.serves_once()
    assert len(world.launched) == 1
    await story.down()
    story.nothing_left()
