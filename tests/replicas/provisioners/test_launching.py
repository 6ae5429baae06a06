"""What an attempt to launch asks for, when it is given up, and that `run` is submitted once."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.provisioners import LaunchError, NoCapacity
from replicas.provisioners.attempt import label
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

ID = "tiny-gw-0badcafe-1"

Build = Callable[..., Service]
SkyPilot = Callable[..., SkyPilotProvisioner]
Eventually = Callable[[Callable[[], Awaitable[object]]], Awaitable[None]]


@pytest.fixture(autouse=True)
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.provisioners.attempt.WATCH_SECONDS", 0.005)


def record(tmp_path: Path) -> Any:
    return json.loads((tmp_path / "replicas" / ID / "process.json").read_text())


# ---------------------------------------------------------------- labels, timer


async def test_a_machine_says_whose_it_is_beside_the_users_own_labels(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    await skypilot().launch(ID, service(resources="{ports: 30000, labels: {team: research}}"), {})
    (task,) = fake_sky.tasks
    assert task["config"]["resources"]["labels"] == {
        "team": "research",
        "skygate-owner": "0badcafe",
        "skygate-service": "tiny",
        "skygate-replica": ID,
    }


async def test_each_choice_has_its_own_labels_and_ours(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    resources = "{ports: 1, labels: {a: all}, any_of: [{labels: {b: one}}, {use_spot: true}]}"
    await skypilot().launch(ID, service(resources=resources), {})
    (task,) = fake_sky.tasks
    asked = task["config"]["resources"]
    assert "labels" not in asked
    assert [{n: v for n, v in one["labels"].items() if len(n) == 1} for one in asked["any_of"]] == [
        {"a": "all", "b": "one"},
        {"a": "all"},
    ]
    assert all(one["labels"]["skygate-owner"] == "0badcafe" for one in asked["any_of"])


async def test_a_cloud_that_refuses_our_labels_gets_the_task_without_them(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    fake_sky.refuses_labels = ValueError("The following labels are invalid:\n\tskygate-owner")
    await skypilot().launch(ID, service(), {})
    assert ["labels" in task["config"]["resources"] for task in fake_sky.tasks] == [True, False]
    assert len(fake_sky.launched) == 1


async def test_labels_of_the_user_that_are_refused_end_the_launch(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    fake_sky.refuses_labels = ValueError("The following labels are invalid:\n\tTeam")
    with pytest.raises(LaunchError, match="Team") as raised:
        await skypilot().launch(ID, service(resources="{ports: 1, labels: {Team: A}}"), {})
    assert raised.value.permanent


@pytest.mark.parametrize(
    ("text", "legal"),
    [
        ("r1", "r1"),
        ("DeepSeek_R1.0", "deepseek-r1-0"),
        ("-" + "x" * 80 + "-gw-0badcafe-7", "x" * 49 + "-gw-0badcafe-7"),
        ("日本", "x"),
    ],
)
def test_a_label_is_legal_on_every_cloud(text: str, legal: str) -> None:
    assert label(text) == legal
    assert len(legal) <= 63


async def test_a_cloud_that_has_no_autodown_is_asked_again_without_the_timer(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    said = fake_sky.error("NotSupportedError", "autodown is not supported by Hyperbolic")
    fake_sky.launch_fails = [fake_sky.unavailable("Failed to provision all.", [said])]
    await provisioner.launch(ID, service(), {})
    assert [asked["idle_minutes_to_autostop"] for asked in fake_sky.launched] == [120, None]
    assert [asked["down"] for asked in fake_sky.launched] == [True, False]
    assert provisioner.dead_man(ID) is None
    await provisioner.instances()
    assert fake_sky.armed == []


async def test_no_capacity_beside_a_cloud_without_autodown_is_no_capacity(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    said = fake_sky.error("NotSupportedError", "autodown is not supported by Hyperbolic")
    fake_sky.launch_fails = [fake_sky.unavailable("none", [said, Exception("us-east-1a: none left")])]
    with pytest.raises(NoCapacity):
        await skypilot().launch(ID, service(), {})
    assert len(fake_sky.launched) == 1


# ---------------------------------------------------------------- the deadline


async def test_an_attempt_that_does_not_end_is_given_up_and_the_next_one_begins_with_nothing(
    skypilot: SkyPilot, fake_sky: Any, service: Build, clock: Any, eventually: Eventually
) -> None:
    provisioner = skypilot()
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service(), {}))

    async def waits() -> bool:
        return bool(fake_sky.held())

    await eventually(waits)
    clock.now += 1199.0
    await asyncio.sleep(0.05)
    assert not launching.done()
    clock.now += 1.0
    with pytest.raises(NoCapacity, match="did not end this attempt within 20 min"):   # so: the next plan
        await launching
    (first,) = fake_sky.requests.values()

    async def cancelled() -> bool:
        return bool(first.status == "CANCELLED")

    await eventually(cancelled)
    left = fake_sky.clusters[ID]
    fake_sky.may_finish.set()
    await provisioner.launch(ID, service(), {})
    assert (fake_sky.downed, fake_sky.jobs(ID)) == ([ID], 1)
    assert fake_sky.clusters[ID] is not left


async def test_an_attempt_that_was_given_up_is_not_waited_for_again(
    skypilot: SkyPilot, fake_sky: Any, service: Build, clock: Any, eventually: Eventually
) -> None:
    """The server neither ends it nor lets it be cancelled."""
    provisioner = skypilot()
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service(), {}))

    async def waits() -> bool:
        return bool(fake_sky.held())

    await eventually(waits)
    fake_sky.api_cancel = lambda request_ids, silent: fake_sky._request(request_ids)
    fake_sky._cancel = lambda request: None
    clock.now += 1200.0
    with pytest.raises(NoCapacity):
        await launching
    with pytest.raises(LaunchError, match="what it left when it was given up is not gone yet") as raised:
        await provisioner.launch(ID, service(), {})
    assert not raised.value.permanent
    assert len(fake_sky.launched) == 1


# ---------------------------------------------------------------- `run`, once


async def broken_before_run(provisioner: SkyPilotProvisioner, fake_sky: Any, service: Service) -> None:
    """Gateway and API server die in the middle of a launch; the machines are there, and are called UP."""
    fake_sky.may_finish.clear()
    launching = asyncio.create_task(provisioner.launch(ID, service, {}))
    while not fake_sky.held():
        await provisioner.instances()
    fake_sky.restart()
    launching.cancel()
    fake_sky.may_finish.set()
    fake_sky.clusters[ID].become("UP")


async def test_up_is_not_trusted_when_gateway_and_server_died_before_run_was_submitted(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    await broken_before_run(skypilot(), fake_sky, service())
    assert record(tmp_path)["submitted"] is False
    assert fake_sky.jobs(ID) == 0
    await skypilot().launch(ID, service(), {})   # the next gateway
    assert (fake_sky.jobs(ID), len(fake_sky.launched)) == (1, 2)
    assert record(tmp_path)["submitted"] is True


async def test_run_is_not_submitted_again_when_the_gateway_died_before_it_could_write_that_down(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    await skypilot().launch(ID, service(), {})
    path = tmp_path / "replicas" / ID / "process.json"
    path.write_text(json.dumps(record(tmp_path) | {"submitted": False}))
    await skypilot().launch(ID, service(), {})
    assert (fake_sky.jobs(ID), len(fake_sky.launched)) == (1, 1)


async def test_what_was_written_down_is_believed_without_asking(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    await skypilot().launch(ID, service(), {})
    fake_sky.queue = lambda cluster: pytest.fail("asked")
    await skypilot().launch(ID, service(), {})
    assert len(fake_sky.launched) == 1


async def test_a_cluster_that_does_not_say_is_asked_again_and_then_made_anew_with_one_run(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    await broken_before_run(skypilot(), fake_sky, service())
    left = fake_sky.clusters[ID]
    fake_sky.queue = lambda cluster: fake_sky._request(fake_sky.command_error("no runtime here", 1))
    provisioner = skypilot()
    for _ in range(2):
        with pytest.raises(LaunchError, match="cannot be told yet") as raised:
            await provisioner.launch(ID, service(), {})
        assert not raised.value.permanent
    assert fake_sky.downed == []
    await provisioner.launch(ID, service(), {})
    assert (fake_sky.downed, fake_sky.jobs(ID)) == ([ID], 1)
    assert fake_sky.clusters[ID] is not left


async def test_a_cluster_that_sky_calls_up_and_never_set_up_is_made_anew_soon(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    """As after a crash of SkyPilot's server between the allocation and the set-up."""
    await broken_before_run(skypilot(), fake_sky, service())
    left = fake_sky.clusters[ID]
    says = f"Cluster '{ID}' has been stopped or not properly set up. Please re-launch it with `sky start`."
    error = fake_sky.exceptions.ClusterNotUpError(says, left.status)
    fake_sky.queue = lambda cluster: fake_sky._request(error)
    provisioner = skypilot()
    for _ in range(2):
        with pytest.raises(LaunchError, match="cannot be told yet"):
            await provisioner.launch(ID, service(), {})
    await provisioner.launch(ID, service(), {})
    assert fake_sky.jobs(ID) == 1
    assert fake_sky.clusters[ID] is not left


async def test_a_machine_that_cannot_be_reached_for_minutes_keeps_its_run(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    """It loads its model: 20 min of a cold start are not thrown away for 15 s of a lost network."""
    await skypilot().launch(ID, service(), {})
    (tmp_path / "replicas" / ID / "process.json").unlink()
    queue = fake_sky.queue
    fake_sky.queue = lambda cluster: fake_sky._request(fake_sky.command_error("ssh: connection timed out"))
    provisioner = skypilot()
    for _ in range(7):
        with pytest.raises(LaunchError, match="cannot be told yet"):
            await provisioner.launch(ID, service(), {})
    fake_sky.queue = queue
    await provisioner.launch(ID, service(), {})
    assert (fake_sky.jobs(ID), fake_sky.downed) == (1, [])


async def test_a_cluster_that_answers_at_the_second_time_keeps_its_run(
    skypilot: SkyPilot, fake_sky: Any, service: Build, tmp_path: Path
) -> None:
    await skypilot().launch(ID, service(), {})
    (tmp_path / "replicas" / ID / "process.json").unlink()
    queue = fake_sky.queue
    fake_sky.queue = lambda cluster: fake_sky._request(fake_sky.command_error("connection reset"))
    provisioner = skypilot()
    with pytest.raises(LaunchError):
        await provisioner.launch(ID, service(), {})
    fake_sky.queue = queue
    await provisioner.launch(ID, service(), {})
    assert (fake_sky.jobs(ID), fake_sky.downed) == (1, [])
