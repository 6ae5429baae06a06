"""The status and a checked YAML as a person reads them in a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.leaving import dead_man_text
from replicas.provisioners import service_and_owner
from replicas.spec import Service

BAR_CELLS = 10
STYLES = {"ready": "green", "not_ready": "red", "failed": "red", "terminating": "dim", "draining": "dim"}


def duration(seconds: float | None) -> str:
    """`42 s`, `12 min`, `3.5 h`; empty for None."""
    if seconds is None:
        return ""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def bar(progress: float | None, cells: int = BAR_CELLS) -> str:
    """A bar of `cells` characters and the percentage; empty for None."""
    if progress is None:
        return ""
    share = min(1.0, max(0.0, progress))
    full = round(share * cells)
    return "━" * full + "╌" * (cells - full) + f" {share:.0%}"


def blocked_text(blocked: Any) -> str:
    """Why a service is blocked, whatever detail the controller gives; empty when it is not."""
    if not blocked:
        return ""
    if isinstance(blocked, Mapping):
        return str(blocked.get("message") or blocked.get("reason") or blocked.get("code") or "blocked")
    return str(blocked)


def cost_text(cost: Mapping[str, Any]) -> str:
    """Dollars of one service: now, so far, idle, and saved against replicas that run all the time."""
    text = f"${cost['hourly'] or 0:.2f} an hour now, ${cost['total'] or 0:.2f} so far"
    if cost.get("idle_share") is not None:
        text += f"; idle {cost['idle_share']:.0%} of its ready time"
    saved = cost.get("saved") or 0.0
    return f"{text}; ${saved:.2f} saved against always on" if saved >= 0.005 else text


def reason_text(replica: Mapping[str, Any], now: float) -> str:
    """Why a replica is as it is; a failed one that is kept says for how long."""
    reason = replica.get("reason") or ""
    until = replica.get("kept_until")
    return f"kept for {duration(max(0.0, until - now))} more: {reason}" if until is not None else reason


def speed_text(replica: Mapping[str, Any]) -> str:
    """Tokens per second: `11.5`, `2,412`; empty when the replica does not say."""
    speed = replica.get("generation_tokens_per_second")
    if speed is None:
        return ""
    return f"{speed:.1f}" if 0 < speed < 100 else f"{speed:,.0f}"


def status_view(status: Mapping[str, Any], now: float | None = None) -> RenderableType:
    """Every service with its replicas."""
    at = time.time() if now is None else now
    parts: list[RenderableType] = []
    down = (status.get("gateway") or {}).get("down")
    if down:
        error = down["error"]
        parts.append(Text(f"going down: {error or 'ending replicas'}", style="red" if error else "yellow"))
    source = status.get("provisioner") or {}
    if source.get("says"):
        parts.append(Text(source["says"], style="red" if source.get("trouble") else "dim"))
    cloud = (status.get("gateway") or {}).get("provisioner") == "skypilot"
    for service in status["services"]:
        parts.extend(_service_view(service, at, cloud))
    parts.extend(_machines("being ended, no row knows them", status.get("strays"), "id", "reason"))
    others = status.get("others") or ()
    orphans = any(service_and_owner(one["name"]) for one in others)
    more = "; `gateway down --orphans OWNER` ends a dead gateway's" if orphans else ""
    parts.extend(_machines(f"not ours, never touched{more}", others, "name", "status"))
    return Group(*parts)


def _machines(
    title: str, found: Sequence[Mapping[str, Any]] | None, name: str, words: str
) -> list[RenderableType]:
    """Machines that are no replica of a service, each with its price."""
    if not found:
        return []
    table = Table(box=None, show_header=False, pad_edge=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(overflow="fold")
    for one in found:
        table.add_row(Text(one[name]), price_text(one["hourly_cost"]), Text(one[words]))
    return [Text(title, style="yellow"), table]


def price_text(hourly: float | None) -> str:
    return "price unknown" if hourly is None else f"${hourly:.2f} an hour"


def _service_view(service: Mapping[str, Any], now: float, cloud: bool) -> list[RenderableType]:
    limits, target, demand, cost = service["limits"], service["target"], service["demand"], service["cost"]
    span = f"{limits['min']}..{limits['max']}" + (" set by `gateway scale`" if limits.get("override") else "")
    head = Text.assemble((service["name"], "bold"), f"  {service['model']}")
    reason = f": {target['reason']}" if target.get("reason") else ""
    lines = [
        f"{demand['waiting']} waiting, {demand['in_flight']} in flight",
        f"target {target['replicas']} of {span}{reason}",
        cost_text(cost),
    ]
    parts: list[RenderableType] = [head, *(Text("  " + line) for line in lines)]
    cause = blocked_text(service.get("blocked"))
    if cause:
        again = f"`gateway retry {service['name']}` tries again"
        parts.append(Text(f"  blocked: {cause}  ({again})", style="red"))
    if service["replicas"]:
        parts.append(_replica_table(service["replicas"], now, cloud))
    elif not cause:
        idle = "no replica; the next request starts one" if limits["max"] else "paused"
        parts.append(Text("  " + idle, style="dim"))
    return parts


def _replica_table(replicas: list[Mapping[str, Any]], now: float, cloud: bool) -> Table:
    """One row each. Columns in which nothing stands are left out: 80 columns are soon full."""
    titles = (
        *("replica", "state", "phase", "ETA", "since", "in flight", "depth", "tok/s", "where", "$/h"),
        "dead-man",
        "reason",
    )
    rows: list[tuple[str | Text, ...]] = []
    for replica in replicas:
        state = replica["state"] + (" (outdated)" if replica.get("outdated") else "")
        window = replica.get("window")
        rows.append(
            (
                Text(replica["id"]),
                Text(state, style=STYLES.get(replica["state"], "yellow")),
                Text(f"{replica.get('phase') or ''} {bar(replica.get('progress'))}".strip()),
                duration(replica.get("eta_seconds")),
                duration(now - replica["since"]) if replica.get("since") else "",
                f"{replica['in_flight']}" + (f"/{window}" if window else ""),
                "" if replica.get("queue_depth") is None else str(replica["queue_depth"]),
                speed_text(replica),
                Text(replica.get("region") or ""),
                f"{replica['hourly_cost']:.2f}" if replica.get("hourly_cost") else "",
                dead_man_text(replica, cloud),
                Text(reason_text(replica, now)),
            )
        )
    table = Table(box=None, pad_edge=True, header_style="dim")
    shown = [i for i in range(len(titles)) if any(row[i] for row in rows)]
    for i in shown:
        whole = titles[i] == "replica"  # an id is there to be copied
        table.add_column(titles[i], no_wrap=whole, overflow="fold" if titles[i] == "reason" else "ellipsis")
    for row in rows:
        table.add_row(*(row[i] for i in shown))
    return table


def service_facts(service: Service) -> dict[str, Any]:
    """What `gateway check` says about a YAML."""
    policy, probe = service.policy, service.probe
    return {
        "name": service.name,
        "model": service.model,
        "port": service.port,
        "readiness_probe": {
            "path": probe.path,
            "initial_delay_seconds": probe.initial_delay_seconds,
            "timeout_seconds": probe.timeout_seconds,
        },
        "replicas": {"min": policy.min_replicas, "max": policy.max_replicas},
        "target_qps_per_replica": policy.target_qps_per_replica,
        "nodes": service.num_nodes,
        "hash": service.hash,
        "warnings": list(service.warnings),
    }


def service_view(service: Service, found: Mapping[str, Any]) -> RenderableType:
    """`found`: what preflight.report says."""
    facts = service_facts(service)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    probe, replicas = facts["readiness_probe"], facts["replicas"]
    rows = {
        "service": facts["name"],
        "model": facts["model"],
        "port": facts["port"],
        "readiness probe": f"{probe['path']}, initial delay {duration(probe['initial_delay_seconds'])}",
        "replicas": f"{replicas['min']}..{'no limit' if replicas['max'] is None else replicas['max']}"
        + (f", {facts['nodes']} machines each" if facts["nodes"] > 1 else ""),
    }
    for title, value in rows.items():
        table.add_row(title, Text(str(value)))
    parts: list[RenderableType] = [table]
    parts += [Text(f"warning: {line}", style="yellow") for line in facts["warnings"]]
    if found["plans"]:
        parts += [Text(), _plan_table(found)]
    if found["findings"]:
        parts.append(Text())
        for one in found["findings"]:
            kind, fix = (f"{one['kind']}: ", "yellow"), (f"  -> {one['fix']}", "dim")
            parts.append(Text.assemble(kind, one["what"], fix))
    return Group(*parts)


def _plan_table(found: Mapping[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("", "plan", "machines", "$/h", "price from"):
        table.add_column(title)
    for number, plan in enumerate(found["plans"], 1):
        kinds = " or ".join(plan["accelerators"]) or "no accelerator"
        price = "unknown" if plan["price"] is None else f"{plan['price']:.2f}"
        source = "over --max-hourly-cost" if plan["refused"] else plan["price_source"] or ""
        machines = Text(f"{plan['nodes']} x {kinds}")
        table.add_row(str(number), Text(plan["plan"]), machines, price, Text(source))
    most = found["ceiling"]
    if most is None:
        words = "at most: unknown, as a price is"
    else:
        limited = " (--max-hourly-cost)" if most == found["max_hourly_cost"] else ""
        words = f"at most: ${most:.2f} an hour{limited}"
    return Group(table, Text(f"{words}, with {found['max_replicas']} replicas"))
