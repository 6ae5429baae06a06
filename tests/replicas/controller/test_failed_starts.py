"""A start that fails ends the holds with its cause, and is not repeated for ever."""

from __future__ import annotations

from typing import Any

from replicas.lifecycle import State
from replicas.provisioners import LaunchError


async def test_a_permanent_launch_error_ends_the_holds_with_the_cause(world: Any) -> None:
    world.provisioner.launch_error = LaunchError("no cloud access is set up")
    world.waits(3)
    await world.steps(3)
    assert world.info.status == "blocked"
    assert world.info.code == "cold_start_failed"
    assert "no cloud access is set up" in world.info.message
    assert 1 <= world.info.retry_after <= 60
    assert ("launch", "failed") in world.observer.told
    assert world.controller.status()["services"][0]["blocked"] == world.info.message


async def test_a_run_that_exits_before_it_is_ready_tells_its_last_words(world: Any) -> None:
    world.provisioner.dies = "exit code 1: CUDA out of memory"
    world.waits(1)
    await world.steps(4)
    assert world.info.status == "blocked"
    assert "CUDA out of memory" in world.info.message
    assert world.machines_of() == set()


async def test_a_replica_that_is_not_ready_within_the_initial_delay_has_failed(world: Any) -> None:
    world.prober.every = "HTTP 503"
    world.waits(1)
    await world.steps(3)
    await world.steps(119, 10.0)
    assert world.states == [State.STARTING]
    await world.steps(3, 10.0, until=lambda: world.info.status == "blocked")
    assert "not ready within the initial delay of 1200 s (HTTP 503)" in world.info.message


async def test_after_the_cool_down_the_next_request_gets_another_start(world: Any) -> None:
    world.provisioner.dies = "exit code 1"
    world.waits(1)
    await world.steps(3, until=lambda: world.info.status == "blocked" if world.control.published else False)
    world.waits(0)
    await world.steps(32, until=lambda: world.info.status == "open")
    assert len(world.provisioner.launched) == 1
    world.provisioner.dies = None
    world.prober.every = True
    world.waits(1)
    await world.steps(3)
    assert world.info.state == "ready"


async def test_a_run_that_exits_1_under_a_client_that_retries_each_second_for_a_day(world: Any) -> None:
    world.provisioner.dies = "exit code 1: no such model"
    await world.step()

    async def client(seconds: int, step: int) -> None:
        for _ in range(0, seconds, step):
            if world.info.status == "blocked":
                world.waits(0)
                world.arrives()
                assert "no such model" in world.info.message
                assert 1 <= world.info.retry_after <= 60
            else:
                world.waits(1)
            await world.step(step)

    await client(900, 1)
    await client(24 * 3600 - 900, 30)
    assert len(world.provisioner.launched) == 3
    assert world.machines_of() == set()
    assert world.info.status == "blocked"
    assert "gateway retry" in world.info.message
    assert len(world.events()) < 60  # and they can all be read
    target = world.controller.status()["services"][0]["target"]
    assert (target["replicas"], target["code"]) == (0, "blocked")


async def test_retry_allows_another_start_and_a_restart_does_not(world: Any) -> None:
    world.provisioner.dies = "exit code 1"
    world.waits(1)
    await world.steps(300)
    assert len(world.provisioner.launched) == 3
    world.start()
    await world.steps(300)
    assert len(world.provisioner.launched) == 3
    world.provisioner.dies = None
    world.controller.retry("r1")
    await world.steps(3)
    assert len(world.provisioner.launched) == 4
    assert world.info.status == "open"


async def test_a_changed_yaml_allows_another_start(world: Any) -> None:
    world.provisioner.dies = "exit code 1"
    world.waits(1)
    await world.steps(300)
    world.start(yaml=world.text.replace("--port", "--log-requests --port"))
    await world.steps(2)
    assert len(world.provisioner.launched) == 4


async def test_a_second_replica_that_fails_takes_nothing_from_the_first(world: Any) -> None:
    await world.become_ready()
    world.provisioner.dies = "exit code 1"
    world.lease(world.id(1), 100)
    world.start(upscale_delay=0.0)
    world.prober.every = True
    await world.steps(5)
    assert len(world.provisioner.launched) == 2
    assert world.info.status == "open"
    assert [u.id for u in world.info.upstreams] == [world.id(1)]
    await world.steps(200)
    assert len(world.provisioner.launched) == 4  # and no more: the third failure in a row


async def test_a_machine_taken_while_it_starts_is_replaced_without_ending_the_holds(world: Any) -> None:
    world.waits(1)
    await world.steps(3)
    world.provisioner.machines.clear()
    await world.steps(10)
    assert world.info.status == "open"
    assert len(world.provisioner.launched) == 1
    await world.steps(30)
    assert len(world.provisioner.launched) == 2


async def test_an_unexpected_error_of_launch_is_tried_again(world: Any, caplog: Any) -> None:
    world.provisioner.launch_error = RuntimeError("surprise")
    world.waits(1)
    await world.steps(2)
    world.provisioner.launch_error = None
    await world.steps(8)
    assert world.states == [State.STARTING]
