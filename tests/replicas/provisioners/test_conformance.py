"""What every provisioner promises (replicas/provisioners/__init__.py), run over all of them."""
from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import pytest

from replicas.provisioners import LaunchError, NoCapacity, Provisioner
from replicas.provisioners.static import StaticProvisioner
from replicas.spec import Service

from .owner import OWNER

ONE, TWO, THREE = (f"tiny-gw-{OWNER}-{n}" for n in (1, 2, 3))
OTHERS = "tiny-gw-deadbeef-1"

Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


class World(Protocol):
    """An outside world in which replicas exist, and gateways that may come and go."""

    service: Service
    capacity: int | None

    def gateway(self, owner: str = OWNER) -> Provisioner: ...
    def exists(self, replica_id: str) -> bool: ...
    def starts(self, replica_id: str) -> int: ...
    def die(self, replica_id: str) -> None: ...


class LocalWorld:
    capacity = None

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.gateway: Any = request.getfixturevalue("local")
        self.running: Any = request.getfixturevalue("running")
        self.folder: Path = request.getfixturevalue("tmp_path") / "replicas"
        self.service: Service = request.getfixturevalue("service")(
            "echo x >> $REPLICA_DIR/starts\nuntil [ -e $REPLICA_DIR/die ]; do sleep 0.02; done"
        )

    def exists(self, replica_id: str) -> bool:
        return self.running() != {}

    def starts(self, replica_id: str) -> int:
        file = self.folder / replica_id / "starts"
        return len(file.read_text().split()) if file.exists() else 0

    def die(self, replica_id: str) -> None:
        (self.folder / replica_id / "die").touch()


class StaticWorld:
    capacity = 2

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.service: Service = request.getfixturevalue("service")()
        self.state: Path = request.getfixturevalue("tmp_path")
        self.urls = ["http://10.0.0.5:30000", "10.0.0.6:30000/"]

    def gateway(self, owner: str = OWNER) -> Provisioner:
        return StaticProvisioner(self.urls, self.state, owner)

    def exists(self, replica_id: str) -> bool:
        file = self.state / f"static-{OWNER}.json"
        return file.exists() and replica_id in file.read_text()

    def starts(self, replica_id: str) -> int:
        return 1   # not ours to start

    def die(self, replica_id: str) -> None:
        pytest.skip("a static server that dies is seen by its probe alone")


class SkyPilotWorld:
    capacity = None

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.gateway: Any = request.getfixturevalue("skypilot")
        self.sky: Any = request.getfixturevalue("fake_sky")
        self.service: Service = request.getfixturevalue("service")()

    def exists(self, replica_id: str) -> bool:
        return replica_id in self.sky.clusters

    def starts(self, replica_id: str) -> int:
        return len([launch for launch in self.sky.launched if launch["cluster_name"] == replica_id])

    def die(self, replica_id: str) -> None:
        self.sky.clusters[replica_id].become("INIT", "unhealthy", "1 of 2 nodes was preempted")


class BedWorld:
    """A real SkyPilot on a real Slurm (tests/e2e/sky/README.md): keeps the fake of SkyPilotWorld honest."""

    capacity = None

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.gateway: Any = request.getfixturevalue("bed")
        self.service: Service = request.getfixturevalue("service")(
            "until [ -e ~/die ]; do sleep 0.5; done", resources="{cpus: 1, memory: 1, ports: 30000}"
        )

    def exists(self, replica_id: str) -> bool:
        # Not those that Slurm is ending already.
        command = ["squeue", "-h", "-t", "PENDING,CONFIGURING,RUNNING,SUSPENDED", "-o", "%j"]
        jobs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return any(job.startswith(f"{replica_id}-") for job in jobs.split())

    def starts(self, replica_id: str) -> int:
        import sky

        return len(sky.get(sky.queue(replica_id)))

    def die(self, replica_id: str) -> None:
        homes = Path(os.environ["SKYGATE_BED"]) / "home"
        (home,) = homes.glob(f"*/.sky_clusters/{replica_id}-*")
        (home / "die").touch()


BED = pytest.param(BedWorld, id="bed", marks=[pytest.mark.sky, pytest.mark.filterwarnings("default")])


@pytest.fixture(
    params=[
        pytest.param(LocalWorld, id="local"),
        pytest.param(StaticWorld, id="static"),
        pytest.param(SkyPilotWorld, id="skypilot"),
        BED,
    ]
)
def world(request: pytest.FixtureRequest) -> World:
    made: World = request.param(request)
    return made


async def test_at_first_there_is_nothing(world: World) -> None:
    assert await world.gateway().instances() == {}


async def test_what_was_launched_is_alive_and_gets_a_url(world: World, eventually: Eventually) -> None:
    provisioner = world.gateway()
    await provisioner.launch(ONE, world.service, {})
    found = await provisioner.instances()
    assert list(found) == [ONE]
    assert (found[ONE].id, found[ONE].alive, found[ONE].detail) == (ONE, True, "")
    assert world.exists(ONE)

    async def has_url() -> bool:
        return (await provisioner.instances())[ONE].url is not None

    await eventually(has_url)
    url = (await provisioner.instances())[ONE].url
    assert url
    assert url.startswith("http://")
    assert not url.endswith("/")


async def test_a_second_launch_of_a_live_id_does_nothing(world: World, eventually: Eventually) -> None:
    provisioner = world.gateway()
    await provisioner.launch(ONE, world.service, {})
    await provisioner.launch(ONE, world.service, {})
    await asyncio.gather(*(provisioner.launch(TWO, world.service, {}) for _ in range(3)))
    assert set(await provisioner.instances()) == {ONE, TWO}

    async def started() -> bool:
        return world.starts(ONE) >= 1 and world.starts(TWO) >= 1

    await eventually(started)
    assert (world.starts(ONE), world.starts(TWO)) == (1, 1)


async def test_what_was_terminated_is_gone_when_terminate_returns(world: World) -> None:
    if isinstance(world, BedWorld):
        pytest.skip("a minute, and the next gateway's case has the same there")
    provisioner = world.gateway()
    await provisioner.launch(ONE, world.service, {})
    await provisioner.terminate(ONE)
    assert await provisioner.instances() == {}
    assert not world.exists(ONE)


async def test_terminating_what_is_not_there_is_success(world: World) -> None:
    provisioner = world.gateway()
    await provisioner.terminate(ONE)
    if isinstance(world, BedWorld):
        pytest.skip("a minute for the rest, which the next gateway's case has there")
    await provisioner.launch(TWO, world.service, {})
    await provisioner.terminate(TWO)
    await provisioner.terminate(TWO)


async def test_a_launch_that_comes_after_its_terminate_starts_nothing(world: World) -> None:
    provisioner = world.gateway()
    await provisioner.terminate(ONE)
    with pytest.raises(LaunchError) as raised:
        await provisioner.launch(ONE, world.service, {})
    assert not raised.value.permanent
    assert await provisioner.instances() == {}
    assert not world.exists(ONE)


async def test_one_ends_without_the_other(world: World) -> None:
    provisioner = world.gateway()
    await provisioner.launch(ONE, world.service, {})
    await provisioner.launch(TWO, world.service, {})
    await provisioner.terminate(ONE)
    found = await provisioner.instances()
    assert list(found) == [TWO]
    assert found[TWO].alive


async def test_the_next_gateway_finds_and_ends_what_the_last_one_launched(world: World) -> None:
    first = world.gateway()
    await first.launch(ONE, world.service, {})
    await first.close()
    second = world.gateway()
    assert (await second.instances())[ONE].alive
    await second.launch(ONE, world.service, {})
    await second.terminate(ONE)
    await second.terminate(ONE)
    assert await second.instances() == {}
    assert not world.exists(ONE)


async def test_another_gateways_replicas_are_neither_seen_nor_ended(world: World) -> None:
    ours, theirs = world.gateway(), world.gateway("deadbeef")
    await theirs.launch(OTHERS, world.service, {})
    assert await ours.instances() == {}
    await ours.terminate(OTHERS)
    assert (await theirs.instances())[OTHERS].alive
    await theirs.terminate(OTHERS)


@pytest.mark.parametrize(
    "name", ["r1-A100", OTHERS, f"tiny-gw-{OWNER}-"], ids=["by hand", "of another", "without a number"]
)
async def test_names_that_are_not_ours_are_never_launched(world: World, name: str) -> None:
    provisioner = world.gateway()
    with pytest.raises(LaunchError):
        await provisioner.launch(name, world.service, {})
    assert await provisioner.instances() == {}


async def test_what_ended_by_itself_is_shown_dead_with_the_cause_until_terminated(
    world: World, eventually: Eventually
) -> None:
    provisioner = world.gateway()
    await provisioner.launch(ONE, world.service, {})
    world.die(ONE)

    async def dead() -> bool:
        return not (await provisioner.instances())[ONE].alive

    await eventually(dead)
    instance = (await provisioner.instances())[ONE]
    assert instance.detail
    assert instance.url is None
    await provisioner.launch(ONE, world.service, {})   # an id lives once
    assert not (await provisioner.instances())[ONE].alive
    assert world.starts(ONE) == 1
    await provisioner.terminate(ONE)
    assert await provisioner.instances() == {}


async def test_no_capacity_is_worth_asking_again(world: World) -> None:
    if world.capacity is None:
        pytest.skip("as many as the machine, or SkyPilot, lets us have")
    provisioner = world.gateway()
    for n in range(world.capacity):
        await provisioner.launch(f"tiny-gw-{OWNER}-{n + 1}", world.service, {})
    with pytest.raises(NoCapacity):
        await provisioner.launch(THREE, world.service, {})
    await provisioner.terminate(ONE)
    await provisioner.launch(f"tiny-gw-{OWNER}-4", world.service, {})


async def test_launch_and_terminate_at_the_same_moment_leave_nothing_unseen(world: World) -> None:
    provisioner = world.gateway()
    launching = asyncio.create_task(provisioner.launch(ONE, world.service, {}))
    await asyncio.sleep(0)
    await provisioner.terminate(ONE)
    await asyncio.gather(launching, return_exceptions=True)
    assert await provisioner.instances() == {}
    assert not world.exists(ONE)
