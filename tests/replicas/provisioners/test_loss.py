"""A replica that is taken away behind the gateway's back, on purpose: for the self-test."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replicas.provisioners import loss

OWNER = "0badcafe"


def test_a_cluster_is_downed_by_its_name(
    fake_sky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "import_sky", lambda: fake_sky)
    for number in (1, 2):
        fake_sky.appear(f"r1-gw-{OWNER}-{number}")
    loss.take_away("skypilot", tmp_path, OWNER, f"r1-gw-{OWNER}-1")
    assert list(fake_sky.clusters) == [f"r1-gw-{OWNER}-2"]


async def test_every_process_of_a_local_replica_is_killed_and_found_dead(
    local: Callable[..., Any], service: Callable[..., Any], tmp_path: Path, eventually: Callable[..., Any]
) -> None:
    provisioner, name = local(), f"r1-gw-{OWNER}-1"
    await provisioner.launch(name, service(run="sleep 600 & sleep 600"), {})
    loss.take_away("local", tmp_path, OWNER, name)

    async def dead() -> bool:
        return not (await provisioner.instances())[name].alive

    await eventually(dead)
    await provisioner.terminate(name)
    with pytest.raises(LookupError, match="no process of it runs"):
        loss.take_away("local", tmp_path, OWNER, name)


@pytest.mark.parametrize("name", ["r1-a100", "r1-gw-deadbeef-1", ""])
def test_what_is_not_ours_is_never_taken_away(fake_sky: Any, tmp_path: Path, name: str) -> None:
    for kind in ("skypilot", "local"):
        with pytest.raises(ValueError, match="not a name of this gateway"):
            loss.take_away(kind, tmp_path, OWNER, name)
