"""What `gateway selftest` may cost: before it begins, and while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway import closing, quote
from gateway.quote import Quote
from gateway.selftest import run
from gateway.settings import SettingsError, make
from gateway.tethered import Tethered
from replicas.spec import load, parse
from replicas.table import Table

SERVICE = parse(
    "resources: {ports: 1}\nrun: ':'\n"
    "service: {readiness_probe: {path: /, initial_delay_seconds: 1500}, replicas: 1}",
    "s.yaml",
)


def plan(price: float | None, refused: bool = False, kind: str = "L4:1") -> dict[str, Any]:
    unpriced = [kind] if kind and price is None else []
    return {"price": price, "refused": refused, "unpriced": unpriced}


def test_the_dearest_plan_counts_for_two_cold_starts_and_the_rest() -> None:
    found = quote.quote(SERVICE, make(idle_timeout=0), [plan(1.0), plan(3.0), plan(90.0, refused=True)])
    assert (found.hourly, found.seconds) == (3.0, 3600.0)
    assert found.dollars == 3.0
    assert quote.refusal(found, 3.0) is None
    assert "may cost $3.00, more than --max-cost 2.9" in (quote.refusal(found, 2.9) or "")


def test_a_price_that_is_not_known_names_the_flag() -> None:
    some = quote.quote(SERVICE, make(), [plan(1.0, kind="T4:1"), plan(None), plan(None, kind="A10G:1")])
    assert (quote.refusal(some, 9) or "").endswith(
        "--price DOLLARS (of a replica, an hour) or --price A10G:1=DOLLARS --price L4:1=DOLLARS (of one node)"
    )
    any_kind = quote.quote(SERVICE, make(), [plan(None, kind="")])
    assert "--price DOLLARS (of a replica, an hour)" in (quote.refusal(any_kind, 9) or "")


def test_no_plan_within_the_hourly_limit_is_said() -> None:
    with pytest.raises(SettingsError, match="over --max-hourly-cost"):
        quote.quote(SERVICE, make(), [plan(9.0, refused=True)])


def test_flags_reach_its_gateway_as_variables_that_others_cannot_read() -> None:
    settings = make(env=["A=1", "B=2"], price=["L4:1=2"], use_spot=False, port=7000, max_replicas=5)
    found = quote.environment(settings, 2.5)
    assert found["GATEWAY_ENV"] == "A=1\nB=2"
    assert (found["GATEWAY_PRICE"], found["GATEWAY_USE_SPOT"]) == ("L4:1=2", "False")
    assert (found["GATEWAY_PORT"], found["GATEWAY_MAX_REPLICAS"]) == ("0", "1")
    assert found["GATEWAY_MAX_DAILY_COST"] == "2.5"
    assert "GATEWAY_STATE_DIR" not in found


def test_it_ends_when_more_is_spent_than_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is dearer than its plan: nothing before the launch can know that."""
    yaml = tmp_path / "dear.yaml"
    yaml.write_text(
        "name: dear\nrun: sleep 60\nresources: {ports: 1}\n"
        "service: {readiness_probe: /health, initial_delay_seconds: 60,"
        " replica_policy: {min_replicas: 0, max_replicas: 1}}\n"
    )
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of the tests stay as they are
    settings = make(str(yaml), provisioner="local", price=["20000"], idle_timeout=1)
    said: list[str] = []
    assert run(settings, load(yaml), 2.0, str(tmp_path / "state"), said.append) == 1
    (failed,) = [line for line in said if line.startswith("FAILED at")]
    assert "launch: $" in failed
    assert "is spent, more than --max-cost 2" in failed
    assert said[-1].startswith("FAILED after")
    assert closing.spent(tmp_path / "state") > 2


def test_what_the_provisioner_still_lists_of_ours_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Table(tmp_path / "state.db") as table:
        ours = f"r1-gw-{table.owner}-1"

    class Still:
        async def instances(self) -> dict[str, Any]:
            return {ours: None, "r1-gw-deadbeef-1": None}

        async def close(self) -> None: ...

    monkeypatch.setattr(closing, "make_provisioner", lambda *_: Still())
    said: list[str] = []
    assert closing.end(Tethered(tmp_path, said.append), "skypilot", said.append) == [ours]
    assert said == []


def test_what_is_left_is_named_with_the_way_to_end_it(tmp_path: Path) -> None:
    text = closing.by_hand(["r1-gw-0-1"], tmp_path, "skypilot")
    assert "r1-gw-0-1" in text
    assert f"`gateway down --state-dir {tmp_path}`" in text
    assert "`sky down NAME`" in text
    assert Quote(1.0, 3600).dollars == 1.0
