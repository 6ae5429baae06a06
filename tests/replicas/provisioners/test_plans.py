"""What a launch plan makes of a launch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.plans import Plan
from replicas.provisioners import Infeasible, NoCapacity
from replicas.provisioners.local import LocalProvisioner
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.spec import Service

ID = "tiny-gw-0badcafe-1"
Build = Callable[..., Service]
SkyPilot = Callable[..., SkyPilotProvisioner]
SPOT = Plan("H100:8", 2, use_spot=True, infra="aws", max_hourly_cost=30.0)


async def test_skypilot_is_asked_for_the_plans_hardware(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    tiny = service()
    await skypilot().launch(ID, tiny, {}, SPOT)
    (task,) = fake_sky.tasks
    assert task["config"]["num_nodes"] == 2
    resources = {name: value for name, value in task["config"]["resources"].items() if name != "labels"}
    assert resources == {
        "ports": 30000, "accelerators": "H100:8", "use_spot": True, "infra": "aws", "max_hourly_cost": 30.0
    }  # fmt: skip
    assert tiny.task["resources"] == {"ports": 30000}  # the next plan begins with the YAML again


async def test_skypilot_gets_the_plans_variables_and_keeps_secrets_secret(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    tiny = service(more="envs: {MODEL: tiny}\nsecrets: {HF_TOKEN: null, REPLICA_API_KEY: null}")
    plan = Plan(envs={"A": "1", "HF_TOKEN": "hf"}, secrets={"MODEL": "other", "B": "2"})
    await skypilot().launch(ID, tiny, {"REPLICA_API_KEY": "key"}, plan)
    (task,) = fake_sky.tasks
    assert sorted(task["env_overrides"]) == [("A", "1"), ("MODEL", "other")]
    assert sorted(task["secrets_overrides"]) == [("B", "2"), ("HF_TOKEN", "hf"), ("REPLICA_API_KEY", "key")]


async def test_another_plan_first_ends_what_the_last_one_left(
    skypilot: SkyPilot, fake_sky: Any, service: Build
) -> None:
    provisioner = skypilot()
    unavailable = fake_sky.unavailable
    fake_sky.leaves_machines = True
    fake_sky.launch_fails = [unavailable("none", [Exception("us-east-1a")])] * 2
    for _ in range(2):  # the same plan goes on with what is there
        with pytest.raises(NoCapacity):
            await provisioner.launch(ID, service(), {}, SPOT)
    left = fake_sky.clusters[ID]
    await provisioner.launch(ID, service(), {}, Plan("H200:8", 1))
    assert fake_sky.clusters[ID] is not left


@pytest.mark.parametrize("kind", ["ResourcesUnavailableError", "NotSupportedError"])
async def test_what_can_never_be_had_is_the_plans_fault(
    skypilot: SkyPilot, fake_sky: Any, service: Build, kind: str
) -> None:
    fake_sky.launch_fails = [getattr(fake_sky.exceptions, kind)("no spot here")]
    with pytest.raises(Infeasible, match="no spot here") as raised:
        await skypilot().launch(ID, service(), {}, SPOT)
    assert raised.value.permanent


async def test_a_local_replica_gets_the_plans_variables(tmp_path: Path, service: Build) -> None:
    provisioner = LocalProvisioner(tmp_path, "0badcafe")
    run = 'echo "$A $B $REPLICA_API_KEY" > $REPLICA_DIR/new; mv $REPLICA_DIR/new $REPLICA_DIR/said'
    plan = Plan("H200:8", 1, envs={"A": "1", "REPLICA_API_KEY": "no"}, secrets={"B": "2"})
    try:
        await provisioner.launch(ID, service(run), {"REPLICA_API_KEY": "key"}, plan)
        said = tmp_path / "replicas" / ID / "said"
        for _ in range(200):
            if said.exists():
                break
            await asyncio.sleep(0.02)
        assert said.read_text() == "1 2 key\n"
    finally:
        await provisioner.terminate(ID)
        await provisioner.close()
