"""What else the provisioner lists: where a cluster is, and which ones are not ours. (A fake in memory.)"""
from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from replicas.provisioners import Other, concerns, service_and_owner
from replicas.provisioners.prices import AGAIN_SECONDS
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

from .sky_records import Cluster

ID = "tiny-gw-0badcafe-1"

Build = Callable[..., Service]
SkyPilot = Callable[..., SkyPilotProvisioner]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("r1", True),
        ("r1-A100", True),
        ("R1_test", True),
        ("r1-gw-deadbeef-4", True),
        ("other-gw-deadbeef-4", True),
        ("r10", False),
        ("r1x-A100", False),
        ("my-r1", False),
        ("training", False),
        ("other-gw-DEADBEEF-4", False),
        ("other-gw-deadbeef-x", False),
    ],
)
def test_only_what_bears_the_services_name_or_a_gateways_is_worth_showing(name: str, shown: bool) -> None:
    assert concerns(name, ["v3", "r1"]) is shown


def test_a_gateways_name_says_for_which_service_and_whose() -> None:
    assert service_and_owner("r1-gw-0-gw-deadbeef-12") == ("r1-gw-0", "deadbeef")
    assert service_and_owner("r1-A100") is None


async def test_where_it_was_placed_and_on_which_market_is_told_as_skypilot_chose(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    await provisioner.launch(ID, service(), {})
    fake_sky.clusters[ID].handle.launched_resources.use_spot = True
    seen = (await provisioner.instances())[ID]
    assert (seen.region, seen.spot, seen.launched_at) == ("aws/us-east-1/us-east-1a", True, 1_800_000_000)
    fake_sky.clusters[ID].handle = None   # SkyPilot has none in the first seconds
    fake_sky.clusters[ID].become("INIT", "launching")
    seen = (await provisioner.instances())[ID]
    assert (seen.alive, seen.region, seen.spot) == (True, "", None)


async def test_what_is_not_ours_is_told_with_status_and_price_and_asks_skypilot_nothing_more(
    skypilot: SkyPilot, fake_sky: Any, service: Build, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    provisioner = skypilot()
    assert await provisioner.others(["tiny"]) == []
    await provisioner.launch(ID, service(), {})
    for name in ("tiny-A100", "r1-gw-deadbeef-4", "somebody-elses", "tinyllama"):
        fake_sky.clusters[name] = Cluster(name, SimpleNamespace(value="UP"))
    fake_sky.clusters["tiny-A100"].become("STOPPED")
    fake_sky.clusters["r1-gw-deadbeef-4"].handle = None
    assert list(await provisioner.instances()) == [ID]
    monkeypatch.setattr(fake_sky, "status", None)
    assert await provisioner.others(["tiny"]) == [
        Other("tiny-A100", "STOPPED", 60.0), Other("r1-gw-deadbeef-4", "UP", None)
    ]
    fake_sky.clusters["tiny-A100"].handle.launched_resources.price = 1.0
    assert (await provisioner.others(["tiny"]))[0].hourly_cost == 60.0
    clock.now += AGAIN_SECONDS
    assert (await provisioner.others(["tiny"]))[0].hourly_cost == 2.0
    for name in ("tiny-A100", "r1-gw-deadbeef-4"):
        await provisioner.terminate(name)
        assert name in fake_sky.clusters
