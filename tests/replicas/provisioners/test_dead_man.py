"""The dead-man's timers: armed from launch on, armed again while we live, a countdown when that fails."""
from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.provisioners import InstancesUnknown
from replicas.provisioners.deadman import DeadMan
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

from .sky_records import WaitFor

ID = "tiny-gw-0badcafe-1"

Build = Callable[..., Service]


@pytest.fixture
def timers(tmp_path: Path, clock: Any) -> Callable[..., DeadMan]:
    """Builds timers that do their work at once, in the caller's thread."""

    def build(limit: float = 7200.0) -> DeadMan:
        return DeadMan(tmp_path, limit, clock=clock, spawn=lambda work, name: work())

    return build


def test_an_order_waits_for_nothing_and_ends_the_cluster(timers: Any, fake_sky: Any, clock: Any) -> None:
    """A `run` that never ends would put off any other kind of timer for ever."""
    kept = timers()
    kept.keep(fake_sky, [ID])
    assert fake_sky.armed == [(ID, 120, WaitFor.NONE, True)]
    assert kept.acts_at(ID) == clock.now + 7200


def test_it_is_armed_every_ten_minutes_and_not_each_second(timers: Any, fake_sky: Any, clock: Any) -> None:
    kept = timers()
    for _ in range(3600):
        kept.keep(fake_sky, [ID])
        clock.now += 1.0
    assert len(fake_sky.armed) == 6
    assert kept.acts_at(ID) - clock.now == 6600.0   # so a gateway that lives keeps it away for ever


def test_the_limit_is_rounded_up_to_minutes(timers: Any, fake_sky: Any) -> None:
    timers(7201.0).keep(fake_sky, [ID])
    assert fake_sky.armed[0][1] == 121


def test_an_order_that_fails_is_repeated_each_minute_while_the_time_runs_out(
    timers: Any, fake_sky: Any, clock: Any, caplog: pytest.LogCaptureFixture
) -> None:
    kept = timers()
    kept.keep(fake_sky, [ID])
    at = kept.acts_at(ID)
    fake_sky.autostop_fails = [fake_sky.command_error("ssh: no route to host")] * 100
    for _ in range(1800):
        clock.now += 1.0
        kept.keep(fake_sky, [ID])
    assert kept.acts_at(ID) == at
    assert len(fake_sky.armed) == 1 + 21   # after 10 minutes, then each minute
    assert [record.message for record in caplog.records if "armed again" in record.message] == [
        f"{ID}: its dead-man's timer could not be armed again: {fake_sky.autostop_fails[0]}"
    ]
    fake_sky.autostop_fails = []
    clock.now += 60.0
    kept.keep(fake_sky, [ID])
    assert kept.acts_at(ID) == clock.now + 7200
    assert caplog.messages[-1] == f"{ID}: its dead-man's timer is armed again"


def test_an_order_without_an_answer_is_given_again_in_time(timers: Any, fake_sky: Any, clock: Any) -> None:
    kept = timers()
    hung: list[Callable[[], object]] = []
    kept._spawn = lambda work, name: hung.append(work)
    for _ in range(301):
        kept.keep(fake_sky, [ID])
        clock.now += 1.0
    assert len(hung) == 2


def test_few_orders_wait_for_a_skypilot_that_never_answers(timers: Any, fake_sky: Any, clock: Any) -> None:
    kept = timers()
    hung: list[Callable[[], object]] = []
    kept._spawn = lambda work, name: hung.append(work)
    for _ in range(24 * 60):
        kept.keep(fake_sky, [ID])
        clock.now += 60.0
    assert 48 <= len(hung) <= 52   # in a day; each holds a thread


def test_a_clock_that_is_set_back_puts_no_order_off(timers: Any, fake_sky: Any, clock: Any) -> None:
    """The cluster's own clock runs on: by ours it would be armed when it has ended itself."""
    kept = timers()
    kept.keep(fake_sky, [ID])
    clock.now -= 7200.0
    for _ in range(600):
        kept.keep(fake_sky, [ID])
        clock.now += 1.0
    assert len(fake_sky.armed) == 2
    assert kept.acts_at(ID) <= clock.now + 7200


def test_a_cloud_without_autodown_has_none_and_is_not_asked_again(
    timers: Any, fake_sky: Any, clock: Any
) -> None:
    fake_sky.autostop_fails = [fake_sky.error("NotSupportedError", "autodown not supported by Verda")]
    kept = timers()
    kept.keep(fake_sky, [ID])
    clock.now += 3600.0
    kept.keep(fake_sky, [ID])
    assert (kept.acts_at(ID), len(fake_sky.armed)) == (None, 1)


def test_the_next_gateway_knows_when_it_acts_and_arms_it_at_once(
    timers: Any, fake_sky: Any, clock: Any
) -> None:
    timers().keep(fake_sky, [ID])
    at = clock.now + 7200
    clock.now += 300.0
    after = timers()
    assert (after.acts_at(ID), after.known()) == (at, [ID])
    after.keep(fake_sky, [ID])
    assert after.acts_at(ID) == at + 300


def test_an_order_that_is_answered_after_the_end_leaves_no_timer(timers: Any, clock: Any) -> None:
    kept = timers()
    kept.armed(ID, clock.now)
    kept.forget(ID)
    kept.armed(ID, clock.now)
    assert (kept.acts_at(ID), kept.known()) == (None, [])


def test_a_full_disk_fails_no_launch_that_has_succeeded(timers: Any, clock: Any, tmp_path: Path) -> None:
    (tmp_path / ID).write_text("where its folder should be")
    kept = timers()
    kept.armed(ID, clock.now)
    assert kept.acts_at(ID) == clock.now + 7200


async def test_a_launch_arms_it_and_looks_keep_it_armed_until_the_end(
    fake_sky: Any, service: Build, clock: Any, tmp_path: Path
) -> None:
    provisioner = SkyPilotProvisioner(
        tmp_path, "0badcafe", sky=lambda: fake_sky, clock=clock, wall=clock, dead_man=9000.0
    )
    await provisioner.launch(ID, service(), {})
    assert fake_sky.launched[0]["idle_minutes_to_autostop"] == 150
    assert provisioner.dead_man(ID) == clock.now + 9000
    await provisioner.instances()
    assert fake_sky.armed == []
    clock.now += 600.0
    await provisioner.instances()
    while not fake_sky.armed:
        await provisioner.instances()
    assert fake_sky.armed == [(ID, 150, WaitFor.NONE, True)]
    await provisioner.terminate(ID)
    assert provisioner.dead_man(ID) is None


async def test_timers_are_kept_armed_on_a_server_of_another_version(
    fake_sky: Any, service: Build, clock: Any, tmp_path: Path
) -> None:
    """Or a server's upgrade would end, two hours later, what serves."""
    provisioner = SkyPilotProvisioner(tmp_path, "0badcafe", sky=lambda: fake_sky, clock=clock, wall=clock)
    await provisioner.launch(ID, service(), {})
    fake_sky.server.common.version = "0.14.2"
    clock.now += 600.0
    while not fake_sky.armed:
        with pytest.raises(InstancesUnknown):
            await provisioner.instances()
    assert fake_sky.armed == [(ID, 120, WaitFor.NONE, True)]


async def test_timers_are_kept_armed_while_skypilot_cannot_say_what_exists(
    fake_sky: Any, service: Build, clock: Any, tmp_path: Path
) -> None:
    """One cluster that cannot be looked at must not end, two hours later, those that serve."""
    provisioner = SkyPilotProvisioner(tmp_path, "0badcafe", sky=lambda: fake_sky, clock=clock, wall=clock)
    await provisioner.launch(ID, service(), {})
    fake_sky.status_fails = ValueError("a handle of another version")
    clock.now += 600.0
    for _ in range(100):
        with pytest.raises(InstancesUnknown):
            await provisioner.instances()
    assert fake_sky.armed == [(ID, 120, WaitFor.NONE, True)]


async def test_a_look_that_skypilot_never_answers_is_left_to_itself(
    fake_sky: Any, service: Build, clock: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replicas.provisioners.skypilot.LOOK_SECONDS", 0.01)
    provisioner = SkyPilotProvisioner(tmp_path, "0badcafe", sky=lambda: fake_sky, clock=clock, wall=clock)
    await provisioner.launch(ID, service(), {})
    answers, asked, status = threading.Event(), threading.Event(), fake_sky.status

    def hang(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        answers.wait(20)
        return status(*args, **kwargs)

    fake_sky.status = hang
    first = asyncio.ensure_future(provisioner.instances())
    await asyncio.to_thread(asked.wait, 10)
    fake_sky.status = status
    clock.now += 299.0
    with pytest.raises(InstancesUnknown, match="not answered yet"):
        await provisioner.instances()
    clock.now += 301.0
    with pytest.raises(InstancesUnknown):
        await provisioner.instances()
    assert (await provisioner.instances()).keys() == {ID}
    assert fake_sky.armed == [(ID, 120, WaitFor.NONE, True)]   # in spite of it
    answers.set()
    with pytest.raises(InstancesUnknown, match="too late"):
        await first
