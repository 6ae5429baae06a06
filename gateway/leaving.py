"""What a person must know when the gateway stops and its replicas do not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

WITH_MACHINE = ("starting", "ready", "not_ready", "draining", "failed")


def keeps_running(services: Iterable[Mapping[str, Any]], *, cloud: bool = False) -> list[str]:
    """What a person must know when the gateway stops and its replicas do not: which, their price, when each
    ends itself (`cloud`: or that it does not), how to end them."""
    replicas = [replica for service in services for replica in service["replicas"]]
    if not replicas:
        return []
    price = sum(replica.get("hourly_cost") or 0.0 for replica in replicas)
    cost = f" and cost ${price:,.2f} an hour" if price else ""
    count = "1 replica keeps" if len(replicas) == 1 else f"{len(replicas)} replicas keep"
    names = ", ".join(f"{replica['id']} ({_how(replica, cloud)})" for replica in replicas)
    return [
        f"{count} running{cost}: {names}",
        "`gateway up` takes them over again; `gateway down` ends them",
    ]


def _how(replica: Mapping[str, Any], cloud: bool) -> str:
    ends = dead_man_text(replica, cloud)
    return f"{replica['state']}, dead-man {ends}" if ends else str(replica["state"])


def dead_man_text(replica: Mapping[str, Any], cloud: bool) -> str:
    """`in 118 min` the replica ends itself without us; `none` where a cloud has no such timer."""
    left = replica.get("dead_man_seconds")
    if left is not None:
        return f"in {left / 60:.0f} min"
    return "none" if cloud and replica["state"] in WITH_MACHINE else ""
