"""What each of SkyPilot's exceptions makes of those who wait, of the launch, and of replicas that serve."""

from __future__ import annotations

import re
from typing import Any

import pytest
import requests

from replicas import plans
from replicas.lifecycle import State
from replicas.plans import Options

PERMANENT = (
    "NoCloudAccessError",
    "NotSupportedError",
    "InvalidClusterNameError",
    "InvalidSkyPilotConfigError",
    "ValueError",
    "CloudError",
    "ClusterOwnerIdentityMismatchError",
    "CloudUserIdentityError",
    "PermissionDeniedError",
    "InvalidCloudCredentials",
    "UserRequestRejectedByPolicy",
)
AWAY = (
    "ApiServerConnectionError",
    "ApiServerAuthenticationError",
    "APIVersionMismatchError",
    "ServerTemporarilyUnavailableError",
    "RequestInterruptedError",
    "ClientError",
    "RequestCancelled",  # by somebody else
    "requests error (ConnectionError)",
    "sqlalchemy error (OperationalError)",
    "botocore error (EndpointConnectionError)",
    "SystemExit",  # SkyPilot's server sends on what ended its worker
    "404",
    "not JSON",
)


def make(world: Any, name: str, says: str = "as SkyPilot says") -> Exception:
    if name == "ValueError":
        return ValueError(says)
    if name == "404":
        return RuntimeError("Failed to get request 0b7f: 404 {'detail': \"Request '0b7f' not found\"}")
    if name == "SystemExit":
        return SystemExit(1)  # type: ignore[return-value]  # it is raised as any other
    if match := re.fullmatch(r"(\w+) error \((\w+)\)", name):  # sky/exceptions.py: wrap_exception
        wrapped: Exception = world.sky.exceptions.CloudError(says, *match.groups())
        return wrapped
    if name == "not JSON":  # a proxy's page in place of an answer; a ValueError by its class
        return requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0)
    error: Exception = world.sky.error(name, says)
    return error


async def until_blocked(world: Any, within: int) -> None:
    await world.steps(within, until=lambda: world.control.published and world.info.status == "blocked")


def failures(world: Any) -> int:
    count: int = world.controller.fleets["r1"].breaker.failures
    return count


# ------------------------------------------------------------ permanent


@pytest.mark.parametrize("when", ["submitted", "executed"])
@pytest.mark.parametrize("name", PERMANENT)
async def test_a_permanent_error_ends_the_holds_at_once_with_skypilots_reason(
    world: Any, name: str, when: str
) -> None:
    fails = world.sky.submit_fails if when == "submitted" else world.sky.launch_fails
    fails.append(make(world, name))
    world.waits(3)
    await until_blocked(world, 4)
    assert world.info.code == "cold_start_failed"
    assert "as SkyPilot says" in world.info.message
    assert 1 <= world.info.retry_after <= 60
    assert world.sky.machines == set()
    assert len(world.launched) <= 1


async def test_nothing_feasible_ends_the_holds_at_once(world: Any) -> None:
    world.sky.launch_fails = [world.sky.unavailable("Catalog does not contain any instances satisfying it")]
    world.waits(1)
    await until_blocked(world, 4)
    assert "Catalog does not contain" in world.info.message


async def test_a_quota_of_zero_everywhere_ends_the_holds_at_once(world: Any) -> None:
    none = [
        world.sky.unavailable(f"Found no quota for p5.48xlarge spot instances in region {region} in AWS.")
        for region in ("us-east-1", "us-west-2")
    ]
    world.sky.launch_fails = [world.sky.unavailable("Failed to provision all possible resources", none)]
    world.waits(1)
    await until_blocked(world, 4)
    assert "Found no quota for p5.48xlarge" in world.info.message


@pytest.mark.parametrize(
    ("code", "printed", "says"),
    [
        ("FAILED", "(tiny, pid=7) torch.OutOfMemoryError: CUDA out of memory\n", "CUDA out of memory"),
        (
            "FAILED_SETUP",
            "(setup pid=4) bash: uv: command not found\n✓ Job finished (status: FAILED_SETUP).\n",
            "setup failed: bash: uv: command not found",
        ),
    ],
)
async def test_a_job_that_failed_ends_the_holds_with_its_last_words(
    world: Any, code: str, printed: str, says: str
) -> None:
    world.sky.printed = printed
    world.sky.run_ended["r1-gw-" + world.table.owner + "-1"] = 100
    world.waits(1)
    await until_blocked(world, 8)
    assert says in world.info.message
    await world.steps(2)
    assert world.sky.machines == set()


# ------------------------------------------------------------ capacity


@pytest.fixture
def three(world: Any) -> Any:
    world.start(launch=Options(tuple(map(plans.parse, ("H200:8x1", "H100:8x2", "A100-80GB:8x4")))))
    return world


def none_free(world: Any) -> Exception:
    tried = [RuntimeError("InsufficientInstanceCapacity in us-east-1a")]
    error: Exception = world.sky.unavailable("Failed to provision all possible launchable resources", tried)
    return error


async def test_no_capacity_tries_the_plans_in_turn_visibly_until_the_provision_timeout(three: Any) -> None:
    three.sky.launch_fails = [none_free(three) for _ in range(1000)]
    three.waits(1)
    seen, etas, begun = set(), set(), three.clock.now
    while three.clock.now - begun < 1190.0:
        await three.step(5.0)
        (row,) = three.service_status["replicas"]
        seen.add(row["plan_place"])
        etas.add(row["eta_seconds"])
        assert three.info.status == "open"
    assert seen == {"1/3", "2/3", "3/3"}
    assert etas == {None}
    assert row["attempt"] >= 14
    assert f"attempt={row['attempt']}" in row["reason"]
    assert "InsufficientInstanceCapacity" in row["reason"]
    await three.steps(6, 5.0, until=lambda: three.info.status == "blocked")
    assert "no machine within 1200 s" in three.info.message
    assert failures(three) == 0  # nobody's mistake
    assert three.sky.machines == set()


@pytest.mark.parametrize("kind", ["no_failover", "KubeAPIUnreachableError"])
async def test_what_was_not_tried_may_be_tried_again(world: Any, kind: str) -> None:
    classes = world.sky.exceptions
    if kind == "no_failover":
        error = classes.ResourcesUnavailableError("Failed to launch cluster", no_failover=True)
    else:
        error = classes.KubeAPIUnreachableError("Cannot connect to the Kubernetes API")
    world.sky.launch_fails = [error]
    world.waits(1)
    await world.steps(10, until=lambda: State.READY in world.states)
    assert failures(world) == 0


# ------------------------------------------------------------ the API server


@pytest.mark.parametrize("name", AWAY)
async def test_trouble_with_the_api_server_repeats_the_launch_and_touches_nothing_that_serves(
    world: Any, name: str
) -> None:
    (one,) = await world.ready()
    world.sky.launch_fails = [make(world, name)]
    world.sky.leaves_machines = True
    world.controller.set_limits("r1", min=2)
    await world.steps(20, until=lambda: world.states == [State.READY, State.READY])
    assert one in [u.id for u in world.info.upstreams]
    assert {id: world.sky.jobs(id) for id in world.sky.machines} == {one: 1, world.id(2): 1}
    assert world.sky.downed == []
    assert failures(world) == 0


@pytest.mark.parametrize("name", AWAY)
async def test_a_list_that_cannot_be_had_ends_and_launches_nothing(
    world: Any, name: str, caplog: Any
) -> None:
    (one,) = await world.ready()
    world.sky.status_fails = make(world, name)
    await world.steps(30, 10.0)
    assert [u.id for u in world.info.upstreams] == [one]
    assert (world.launched, world.sky.downed) == ([one], [])
    assert "what exists is not known" in caplog.text


async def test_our_own_cancel_is_no_failure(world: Any) -> None:
    world.sky.may_finish.clear()
    world.waits(1)
    await world.steps(3)
    assert world.states == [State.PROVISIONING]
    world.controller.set_limits("r1", max=0)
    world.waits(0)
    await world.steps(5, until=lambda: not world.replicas)
    assert world.sky.machines == set()
    assert failures(world) == 0


# ------------------------------------------------------------ one cluster


async def test_a_name_that_is_taken_by_other_hardware_is_downed_first(world: Any) -> None:
    world.sky.leaves_machines = True
    world.sky.launch_fails = [world.sky.error("ResourcesMismatchError", "Requested resources do not match")]
    world.waits(1)
    await world.steps(12, until=lambda: State.READY in world.states)
    assert world.sky.downed == [world.id(1)]
    assert world.launched == [world.id(1)] * 2
    assert {id: world.sky.jobs(id) for id in world.sky.machines} == {world.id(1): 1}


@pytest.mark.parametrize("name", ["CommandError", "ClusterSetUpError"])
async def test_machines_that_cannot_be_set_up_are_downed_and_are_a_strike(world: Any, name: str) -> None:
    world.sky.leaves_machines = True
    world.sky.launch_fails = [make(world, name, "ssh: connection reset")]
    world.waits(1)
    await world.steps(4)
    assert (world.sky.machines, failures(world)) == (set(), 1)
    assert world.info.status == "open"  # another may fare better: who waits goes on waiting
    await world.steps(40, until=lambda: State.READY in world.states)
    assert world.launched == [world.id(1), world.id(2)]
    assert failures(world) == 0


async def test_three_that_cannot_be_set_up_in_a_row_end_the_holds(world: Any) -> None:
    world.sky.leaves_machines = True
    world.sky.launch_fails = [make(world, "CommandError", "ssh: connection reset") for _ in range(9)]
    world.waits(1)
    await until_blocked(world, 200)
    await world.steps(300, 10.0)
    assert world.launched == [world.id(n) for n in (1, 2, 3)]
    assert "ssh: connection reset" in world.info.message
    assert world.sky.machines == set()


async def test_a_cluster_that_is_not_up_has_no_endpoint_yet(world: Any) -> None:
    world.sky.endpoints_fail = world.sky.error("ClusterNotUpError", "is not up")
    world.waits(1)
    await world.steps(30)
    assert world.states == [State.STARTING]
    assert (world.launched, world.sky.downed) == ([world.id(1)], [])
    world.sky.endpoints_fail = None
    await world.steps(5, until=lambda: world.states == [State.READY])


async def test_a_down_of_what_does_not_exist_is_a_success(world: Any) -> None:
    (one,) = await world.ready()
    world.sky.clusters.clear()  # somebody else was faster
    world.sky.machines.clear()
    world.controller.set_limits("r1", max=0)
    await world.steps(5, until=lambda: not world.replicas)
    assert world.sky.downed == [one]
    assert world.events("terminate_failed") == []
