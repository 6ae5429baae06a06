"""What a failed or preempted replica printed is kept when its machines are gone, and holds no secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from replicas.lifecycle import State
from replicas.plans import Options

# A thread of a killed gateway ends by SystemExit, which Python passes over in silence and pytest does not.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SECRETS = Options(secrets={"PLAN": "plan-secret"})


def prints(world: Any) -> str:
    """Every replica prints its key from now on; the key."""
    (key,) = world.controller.keys.values()
    world.sky.printed = (
        f"(head, rank=0, pid=9) server_args=ServerArgs(api_key='{key}')\n"
        "(worker1, rank=1, pid=8, ip=10.0.0.12) plan-secret\n"
        f"(head, rank=0, pid=9) CUDA out of memory, said {key}\n"
    )
    world.sky.provisioned = {None: "Waiting for the head node, plan-secret\n"}
    return str(key)


def folder(world: Any, id: str) -> Path:
    return Path(world.state_dir) / "replicas" / id


def texts(world: Any, id: str) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder(world, id).iterdir()}


def without_secrets(world: Any, id: str, key: str) -> dict[str, str]:
    """The logs of a replica that is gone."""
    found = texts(world, id)
    assert sorted(found) == ["output.log", "provision.log", "rank-0.log", "rank-1.log"]
    assert "api_key='***'" in found["rank-0.log"]
    assert found["rank-1.log"].endswith(" ***\n")
    told = "".join(found.values()) + str(world.controller.status()) + str(world.events())
    assert key not in told
    assert "plan-secret" not in told
    return found


async def test_the_logs_of_a_machine_that_is_kept_are_there_meanwhile_and_afterwards(world: Any) -> None:
    key = prints(world)
    (id,) = await world.ready(launch=SECRETS, keep_failed=1800.0)
    await world.steps(20, until=lambda: "out of memory" in texts(world, id)["output.log"])
    world.sky.run_ended[id] = 100
    await world.steps(20, until=lambda: world.replica(id).state is State.FAILED)
    await world.steps(10, 60.0)
    assert id in world.sky.machines
    assert "CUDA out of memory, said ***" in texts(world, id)["output.log"]
    assert world.replica(id).failure == "crashed"
    assert world.replica(id).reason.endswith("CUDA out of memory, said ***")
    await world.steps(40, 60.0, until=lambda: id not in [r.id for r in world.replicas])
    assert id not in world.sky.machines
    without_secrets(world, id, key)


async def test_the_logs_of_a_preempted_replica_are_kept(world: Any) -> None:
    key = prints(world)
    (id,) = await world.ready(launch=SECRETS)
    await world.steps(20, until=lambda: "out of memory" in texts(world, id)["output.log"])
    world.sky.lose(id)
    await world.steps(90, until=lambda: id not in [r.id for r in world.replicas])
    without_secrets(world, id, key)
