"""How SkyPilot is used: what is asked of it, what its answers and errors mean. (A fake in memory.)"""
from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.provisioners import InstancesUnknown, LaunchError, NoCapacity, TerminateError
from replicas.provisioners.attendant import base_url, internal_url
from replicas.provisioners.skypilot import REFRESH_SECONDS, SkyPilotProvisioner
from replicas.spec import Service

from .sky_records import WaitFor

ID = "tiny-gw-0badcafe-1"

Build = Callable[..., Service]
SkyPilot = Callable[..., SkyPilotProvisioner]
Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


async def test_a_launch_is_one_round_with_a_dead_mans_timer_under_the_replicas_name(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    await skypilot().launch(ID, service(), {})
    timer = {"idle_minutes_to_autostop": 120, "wait_for": WaitFor.NONE, "down": True}
    assert fake_sky.launched == [{"cluster_name": ID, "retry_until_up": False, **timer}]


async def test_skypilot_gets_the_task_without_its_service_and_the_key_as_a_secret(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    tiny = service(more="envs: {MODEL: tiny}\nsecrets: {REPLICA_API_KEY: null, TOKEN: t}")
    await skypilot().launch(ID, tiny, {"REPLICA_API_KEY": "key", "MODEL": "other"})
    (task,) = fake_sky.tasks
    assert "service" not in task["config"]
    assert "sleep 1000" in task["config"]["run"]
    assert task["env_overrides"] == [("MODEL", "other")]
    assert sorted(task["secrets_overrides"]) == [("REPLICA_API_KEY", "key"), ("TOKEN", "t")]
    assert tiny.task["run"]   # from_yaml_config empties what it is given; ours is a copy


async def test_a_replica_is_provisioning_then_has_url_price_and_the_phases_of_its_output(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually
) -> None:
    provisioner = skypilot()
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service(), {}))

    async def listed() -> bool:
        return (await provisioner.instances()).get(ID, SimpleNamespace(hourly_cost=None)).hourly_cost == 60.0

    await eventually(listed)
    instance = (await provisioner.instances())[ID]
    assert (instance.alive, instance.url, instance.phase) == (True, None, "provision")
    fake_sky.exposed = {}   # K8s: the load balancer has no address yet
    fake_sky.may_finish.set()
    await launching
    instance = (await provisioner.instances())[ID]
    assert (instance.alive, instance.url) == (True, None)
    fake_sky.exposed = {22: "10.0.0.5:22", 30000: "10.0.0.5:30000"}

    async def downloading() -> bool:
        instance = (await provisioner.instances())[ID]
        return instance.progress == 0.5 and instance.url is not None

    await eventually(downloading)
    instance = (await provisioner.instances())[ID]
    assert (instance.url, instance.phase) == ("http://10.0.0.5:30000", "download")
    assert instance.hourly_cost == 60.0   # two nodes at $30


async def test_a_launch_that_a_dead_gateway_began_is_waited_for_and_not_begun_again(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually
) -> None:
    fake_sky.may_finish.clear()
    dead = asyncio.create_task(skypilot().launch(ID, service(), {}))

    async def begun() -> bool:
        return bool(fake_sky.launched)

    await eventually(begun)
    provisioner = skypilot()
    assert (await provisioner.instances())[ID].phase == "provision"
    adopted = asyncio.create_task(provisioner.launch(ID, service(), {}))
    await asyncio.sleep(0.05)
    assert not adopted.done()
    fake_sky.may_finish.set()
    await adopted
    await dead
    assert len(fake_sky.launched) == 1
    assert (await provisioner.instances())[ID].alive


async def test_terminate_in_the_middle_of_a_launch_cancels_it_and_takes_down_what_it_made(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually
) -> None:
    provisioner = skypilot()
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service(), {}))

    async def begun() -> bool:
        return ID in fake_sky.clusters

    await eventually(begun)
    await provisioner.terminate(ID)
    assert fake_sky.clusters == {}
    with pytest.raises(LaunchError, match="cancelled") as raised:
        await launching
    assert not raised.value.permanent


async def test_terminate_waits_for_a_launch_that_is_being_submitted(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.submitting.clear()   # uploading file mounts
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service(), {}))
    await asyncio.sleep(0.05)
    terminating = asyncio.create_task(provisioner.terminate(ID))
    assert await provisioner.instances() == {}   # does not wait for either
    fake_sky.submitting.set()
    await terminating
    with pytest.raises(LaunchError):
        await launching
    assert fake_sky.clusters == {}


async def test_down_is_repeated_until_the_cluster_is_no_longer_listed(
    skypilot: SkyPilot, fake_sky: Any, service: Build, clock: Any
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    fake_sky.down_fails = [RuntimeError("quota API timed out"), RuntimeError("again")]
    fake_sky.down_does_nothing = 2
    await provisioner.terminate(ID)
    assert fake_sky.clusters == {}
    assert clock.now == 1000.0 + 4 * 5.0


async def test_a_cluster_that_does_not_go_is_an_error_with_skypilots_words(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    fake_sky.down_fails = [RuntimeError("\x1b[31mno permission\x1b[0m to\ndelete")] * 1000
    with pytest.raises(TerminateError, match="not verified gone: no permission to delete"):
        await provisioner.terminate(ID)
    assert (await provisioner.instances())[ID].alive   # so the caller tries again
    fake_sky.down_fails = []
    await provisioner.terminate(ID)
    assert await provisioner.instances() == {}


async def test_a_preempted_cluster_is_gone_after_the_next_refresh(
    skypilot: SkyPilot, fake_sky: Any, service: Build, clock: Any
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    assert ID in await provisioner.instances()
    fake_sky.lose(ID)
    refreshes = fake_sky.refreshes
    for _ in range(3):
        assert ID in await provisioner.instances()
    assert fake_sky.refreshes == refreshes   # a refresh asks the cloud: not each second
    clock.now += REFRESH_SECONDS
    assert await provisioner.instances() == {}


async def test_only_our_clusters_are_refreshed(skypilot: SkyPilot, fake_sky: Any, clock: Any) -> None:
    provisioner = skypilot()
    fake_sky.launch(None, cluster_name="r1-A100")
    clock.now += REFRESH_SECONDS
    assert await provisioner.instances() == {}
    assert fake_sky.refreshes == 0


@pytest.mark.parametrize(
    ("status", "kind", "why", "detail"),
    [
        ("INIT", "unhealthy", "1 of 2 nodes was preempted", "SkyPilot says INIT: 1 of 2 nodes was preempted"),
        ("STOPPED", None, None, "SkyPilot says STOPPED: lost, preempted or stopped"),
        ("AUTOSTOPPING", None, None, "SkyPilot says AUTOSTOPPING: lost, preempted or stopped"),
    ],
)
async def test_a_cluster_that_is_not_up_any_more_is_dead(
    skypilot: SkyPilot, fake_sky: Any, service: Build, status: str, kind: str | None, why: str, detail: str
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    fake_sky.clusters[ID].become(status, kind, why)
    instance = (await provisioner.instances())[ID]
    assert (instance.alive, instance.detail) == (False, detail)


async def test_a_run_that_ended_is_dead_with_its_last_words(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually, tmp_path: Path
) -> None:
    provisioner = skypilot()
    fake_sky.printed = (
        "\x1b[36m(tiny, pid=7)\x1b[0m torch.OutOfMemoryError: CUDA out of memory\n"
        "ERROR: \x1b[31mJob 1 failed with return code list:\x1b[0m [1]\n"
        "\x1b[0m\x1b[32m✓ Job finished (status: FAILED).\x1b[0m\x1b[0m\n"
        "srun: error: n1: task 0: Exited with exit code 100\n"
    )
    fake_sky.run_ended[ID] = 100
    await provisioner.launch(ID, service(), {})

    async def dead() -> bool:
        return not (await provisioner.instances())[ID].alive

    await eventually(dead)
    detail = (await provisioner.instances())[ID].detail
    assert detail == "run ended: torch.OutOfMemoryError: CUDA out of memory"
    assert "Launching on AWS" in (tmp_path / "replicas" / ID / "output.log").read_text()
    await provisioner.terminate(ID)
    assert "CUDA out of memory" in (tmp_path / "replicas" / ID / "output.log").read_text()


async def test_a_setup_that_failed_is_told_as_such(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually
) -> None:
    provisioner = skypilot()
    fake_sky.printed = (
        "(setup pid=490) bash: uv: command not found\n"
        "ERROR: Job 1's setup failed with return code 127 (pid=468). See error logs above for more details.\n"
        "✓ Job finished (status: FAILED_SETUP).\n"
    )
    fake_sky.run_ended[ID] = 100
    await provisioner.launch(ID, service(), {})

    async def told() -> bool:
        return (await provisioner.instances())[ID].detail == "setup failed: bash: uv: command not found"

    await eventually(told)


async def test_an_api_server_that_does_not_answer_is_not_the_same_as_no_replicas(
    skypilot: SkyPilot, fake_sky: Any
) -> None:
    provisioner = skypilot()
    fake_sky.status_fails = fake_sky.exceptions.ApiServerConnectionError("Could not connect to it")
    with pytest.raises(InstancesUnknown, match="Could not connect"):
        await provisioner.instances()


@pytest.mark.parametrize(
    ("name", "permanent"),
    [
        ("NoCloudAccessError", True),
        ("NotSupportedError", True),
        ("InvalidClusterNameError", True),
        ("InvalidSkyPilotConfigError", True),
        ("CloudUserIdentityError", True),
        ("CommandError", False),
        ("ApiServerConnectionError", False),
        ("ClusterDoesNotExist", False),
    ],
)
async def test_errors_tell_whether_to_try_again(
    skypilot: SkyPilot, fake_sky: Any, service: Build, name: str, permanent: bool
) -> None:
    fake_sky.launch_fails = [fake_sky.error(name, "as SkyPilot says")]
    with pytest.raises(LaunchError, match="as SkyPilot says") as raised:
        await skypilot().launch(ID, service(), {})
    assert raised.value.permanent is permanent
    assert not isinstance(raised.value, NoCapacity)


async def test_no_capacity_anywhere_is_not_permanent_but_nothing_feasible_is(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    unavailable = fake_sky.unavailable
    tried = [Exception("us-east-1a: InsufficientInstanceCapacity"), Exception("us-east-1b: the same")]
    fake_sky.launch_fails = [unavailable("Failed to provision all.", tried), unavailable("No resource fits.")]
    with pytest.raises(NoCapacity, match=r"Failed to provision all\. \(last: us-east-1b: the same\)"):
        await provisioner.launch(ID, service(), {})
    with pytest.raises(LaunchError, match=r"No resource fits\.") as raised:
        await provisioner.launch(ID, service(), {})
    assert raised.value.permanent


async def test_a_launch_that_failed_half_way_is_shown_and_goes_on_when_asked_again(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.leaves_machines = True
    fake_sky.launch_fails = [fake_sky.command_error("ssh: connection reset")]
    with pytest.raises(LaunchError):
        await provisioner.launch(ID, service(), {})
    assert (await provisioner.instances())[ID].phase == "provision"   # it bills: the caller must see it
    await provisioner.launch(ID, service(), {})
    assert len(fake_sky.launched) == 2
    assert fake_sky.clusters[ID].status.value == "UP"


@pytest.mark.parametrize(
    "says",
    ["not supported by Slurm: open_ports  Opening ports is not supported in Slurm.",
     "No enabled clouds support opening ports. To fix: do not specify resources.ports, or"],
)
@pytest.mark.parametrize("resources", ["{ports: 30000}", "{any_of: [{ports: 30000}, {ports: 30000}]}"])
async def test_a_cloud_without_ports_gets_the_task_without_them_and_is_reached_at_the_nodes_own_address(
    skypilot: SkyPilot, fake_sky: Any, service: Build, eventually: Eventually, says: str, resources: str
) -> None:
    error = fake_sky.exceptions.NotSupportedError if "open_ports" in says else ValueError
    fake_sky.refuses_ports = error(says)
    provisioner = skypilot()
    tiny = service(resources=resources)
    await provisioner.launch(ID, tiny, {})
    asked, again = (task["config"]["resources"] for task in fake_sky.tasks)
    assert "ports" in str(asked)
    assert "ports" not in str(again)
    assert "ports" in str(tiny.task)

    async def found() -> bool:
        return (await provisioner.instances())[ID].url == "http://10.0.0.11:30000"

    await eventually(found)


async def test_other_things_that_a_cloud_does_not_support_end_the_launch(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    fake_sky.refuses_ports = fake_sky.exceptions.NotSupportedError("spot_instance  no spot in Slurm.")
    with pytest.raises(LaunchError, match="no spot in Slurm") as raised:
        await skypilot().launch(ID, service(), {})
    assert raised.value.permanent
    assert len(fake_sky.tasks) == 1


async def test_a_launch_that_broke_before_run_is_made_again_although_a_refresh_calls_the_cluster_up(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.leaves_machines = True
    fake_sky.launch_fails = [fake_sky.command_error("Failed to run setup commands on an instance")]
    with pytest.raises(LaunchError):
        await provisioner.launch(ID, service(), {})
    fake_sky.clusters[ID].become("UP")   # the machines are there, and nothing on them
    await provisioner.launch(ID, service(), {})
    assert len(fake_sky.launched) == 2
    await provisioner.launch(ID, service(), {})
    assert len(fake_sky.launched) == 2


async def test_a_launch_that_went_on_while_its_server_did_not_answer_is_not_made_again(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    fake_sky.leaves_machines = True
    fake_sky.launch_fails = [fake_sky.exceptions.ApiServerConnectionError("lost")]
    with pytest.raises(LaunchError):
        await provisioner.launch(ID, service(), {})
    fake_sky.clusters[ID].become("UP")
    for request in fake_sky.requests.values():
        request.job = True
    await provisioner.launch(ID, service(), {})
    assert len(fake_sky.launched) == 1


async def test_a_failover_table_is_cut_to_a_line(skypilot: SkyPilot, fake_sky: Any, service: Build) -> None:
    fake_sky.launch_fails = [RuntimeError("zone " * 1000)]
    with pytest.raises(LaunchError) as raised:
        await skypilot().launch(ID, service(), {})
    assert len(raised.value.reason) <= 500


@pytest.mark.parametrize(
    ("endpoints", "port", "url"),
    [
        ({30000: "10.0.0.5:30000"}, 30000, "http://10.0.0.5:30000"),
        ({"30000": "10.0.0.5:41234"}, 30000, "http://10.0.0.5:41234"),
        ({30000: "http://1.2.3.4/skypilot/ns/c/30000/"}, 30000, "http://1.2.3.4/skypilot/ns/c/30000"),
        ({30000: "https://x.example.com"}, 30000, "https://x.example.com"),
        ({}, 30000, None),
        ({22: "10.0.0.5:22"}, 30000, None),
        ({30000: "10.0.0.5:30000"}, None, "http://10.0.0.5:30000"),
        ({1: "a:1", 2: "a:2"}, None, None),
    ],
)
def test_an_endpoint_becomes_a_url_with_scheme_and_its_path(
    endpoints: dict[int, str], port: int | None, url: str | None
) -> None:
    assert base_url(endpoints, port) == url


@pytest.mark.parametrize("addresses", [None, []])
def test_a_cluster_without_addresses_has_no_url_yet(addresses: list[tuple[str, str]] | None) -> None:
    assert internal_url(None, 30000) is None
    assert internal_url(SimpleNamespace(stable_internal_external_ips=addresses), 30000) is None
    assert internal_url(SimpleNamespace(stable_internal_external_ips=[("10.0.0.11", "x")]), None) is None
