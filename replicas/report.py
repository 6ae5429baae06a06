"""What is told about a fleet: to the workers (`ServiceInfo`, `ColdStart`) and to people (`status`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from replicas import budget
from replicas.costs import Sums, summary
from replicas.fleet import Fleet
from replicas.health import UNKNOWN_LIVES, Signs
from replicas.lifecycle import CAPACITY, COMING, SERVING, Replica, State
from replicas.loads import Load, LoadPoller
from replicas.messages import ColdStart, ServiceInfo, Status, UpstreamInfo
from replicas.phases import PHASES
from replicas.tls import Certificates

HOLD_SPARE = 300.0  # s that a hold may last beyond provision timeout and initial delay


def still(info: ServiceInfo) -> ServiceInfo:
    """What must differ for a new generation; the rest is only true at the moment of telling."""
    return replace(info, cold=None, retry_after=0)


def service_info(
    fleet: Fleet,
    window: Callable[[str], int],
    replica_key: str,
    certificates: Certificates,
    now: float,
) -> ServiceInfo:
    status, code, message, retry_after = _status(fleet, now)
    upstreams = tuple(
        UpstreamInfo(r.id, r.slot, r.url, window(r.id), certificates.pinned(r.id, r.url))
        for r in fleet.rows.values()
        if r.state is State.READY and r.url is not None
    )
    return ServiceInfo(
        name=fleet.service.name,
        index=fleet.index,
        model=fleet.service.model,
        status=status,
        code=code,
        message=message,
        retry_after=retry_after,
        upstreams=upstreams,
        state=state(fleet),
        hold_max_seconds=hold_max(fleet),
        upstream_timeout=fleet.service.stream_timeout_seconds,
        replica_key=replica_key,
        cold=cold_start(fleet, now),
        replica_cert=certificates.cert(fleet.service.name),
        replica_ca=certificates.ca,
    )


def _status(fleet: Fleet, now: float) -> tuple[Status, str, str, int]:
    name = fleet.service.name
    if fleet.stopping:
        return "stopping", "service_stopping", "the gateway is going down and has ended its replicas", 60
    if fleet.policy.max == 0:
        return "paused", "service_paused", f"{name} is paused: `gateway scale {name} --max N` resumes it", 60
    if fleet.count(*CAPACITY):
        return "open", "", "", 10
    if too_dear := fleet.launches.refusal(fleet.rows.values(), now):
        return "blocked", "cold_start_failed", f"no replica is launched: {too_dear}", 60
    if fleet.breaker.ends_holds(now):
        return "blocked", "cold_start_failed", fleet.breaker.message(now), fleet.breaker.retry_after(now)
    return "open", "", "", 10


def hold_max(fleet: Fleet) -> float:
    """Seconds that a request is held at most."""
    if fleet.config.hold_max is not None:
        return fleet.config.hold_max
    return fleet.config.provision_timeout + fleet.service.probe.initial_delay_seconds + HOLD_SPARE


def state(fleet: Fleet) -> str:
    """cold, starting, ready or not_ready: of the service as a whole."""
    if fleet.count(State.READY):
        return "ready"
    if fleet.count(*COMING):
        return "starting"
    return "not_ready" if fleet.count(State.NOT_READY) else "cold"


def cold_start(fleet: Fleet, now: float) -> ColdStart | None:
    """Of the replica that is furthest, while none is READY; None when nothing starts."""
    coming = [r for r in fleet.rows.values() if r.state in COMING]
    if not coming or fleet.count(State.READY):
        return None
    r = max(coming, key=lambda r: (_place(r), r.progress or 0.0, -r.n))
    number, of, attempt = place(fleet, r, now)
    plan = f"{number}/{of}" if of > 1 else ""
    return ColdStart(r.id, r.phase, r.progress, eta(fleet, r, now), r.reason, plan, attempt)


def place(fleet: Fleet, r: Replica, now: float) -> tuple[int, int, int]:
    """Of a replica that looks for a machine: which plan, of how many, which attempt; else zeros."""
    if r.state is not State.PROVISIONING:
        return 0, 0, 0
    return *fleet.launches.place(r, fleet.rows.values(), now), fleet.launches.attempt(r)


def eta(fleet: Fleet, r: Replica, now: float) -> float | None:
    """Seconds until READY. None when a first attempt has failed: nobody knows when there will be capacity."""
    looks = r.state is State.PROVISIONING and fleet.launches.attempt(r) > 1
    return fleet.starts.past.eta(r, now) if r.state in COMING and not looks else None


def _place(r: Replica) -> int:
    return PHASES.index(r.phase) if r.phase in PHASES else -1


def rounded(cold: ColdStart | None) -> ColdStart | None:
    """To whole seconds and per cent: what is worth a message."""
    if cold is None:
        return None
    return replace(
        cold,
        progress=None if cold.progress is None else round(cold.progress, 2),
        eta_seconds=None if cold.eta_seconds is None else round(cold.eta_seconds),
    )


def limits(fleet: Fleet) -> dict[str, Any]:
    policy = fleet.policy
    return {"min": policy.min, "max": policy.max, "override": fleet.override is not None}


def status(fleet: Fleet, loads: LoadPoller, sums: Sums, now: float) -> dict[str, Any]:
    """One service of GET /admin/status. Times: unix seconds; money: dollars."""
    service_status, _, message, _ = _status(fleet, now)
    hourly = sum(r.hourly_cost or 0.0 for r in fleet.rows.values() if r.state is not State.PENDING)
    decision = fleet.decision
    return {
        "name": fleet.service.name,
        "model": fleet.service.model,
        "state": state(fleet),
        "status": service_status,
        "limits": limits(fleet),
        "target": {"replicas": decision.target, "reason": decision.reason, "code": decision.code},
        "blocked": message if service_status == "blocked" else fleet.breaker.message(now) or None,
        "frozen": fleet.frozen,
        "terminating_seconds": max((now - r.since for r in fleet.rows.values() if _ends(r)), default=0.0),
        "demand": demand(fleet),
        "replicas": [_replica(fleet, r, loads, now) for r in fleet.rows.values()],
        "cost": {"hourly": hourly, **summary(sums, max(fleet.policy.min, 1), now)},
    }


def _ends(r: Replica) -> bool:
    """It is to be gone: nothing is waited for but its end."""
    return r.state is State.TERMINATING or (r.state is State.DRAINING and r.reason == UNKNOWN_LIVES)


def demand(fleet: Fleet) -> dict[str, int]:
    """As the board has it at this moment, not as of the last tick."""
    return {
        "waiting": 0 if fleet.retired else fleet.board.totals(fleet.index).waiting,
        "in_flight": sum(fleet.board.in_flight(r.slot) for r in fleet.rows.values()),
    }


def _replica(fleet: Fleet, r: Replica, loads: LoadPoller, now: float) -> dict[str, Any]:
    load = loads.results.get(r.id, Load())
    in_flight = fleet.board.in_flight(r.slot)
    number, of, attempt = place(fleet, r, now)
    signs = fleet.signs.get(r.id, Signs())
    return {
        "id": r.id,
        "state": str(r.state),
        "plan": r.plan or None,
        "plan_place": f"{number}/{of}" if of else None,
        "attempt": attempt or None,
        "phase": r.phase,
        "progress": r.progress,
        "eta_seconds": eta(fleet, r, now),
        "since": r.since,
        "url": r.url,
        "in_flight": in_flight,
        "queue_depth": in_flight + load.foreign,
        "window": loads.window(r.id) if r.state is State.READY else r.window,
        "generation_tokens_per_second": signs.generation if r.state in SERVING else None,
        "hourly_cost": r.hourly_cost,
        "region": r.region or None,
        "spot": budget.on_spot(r),
        "outdated": fleet.outdated(r),
        "reason": r.reason,
        "failure": r.failure,
        "kept_until": fleet.kept_until(r),
        "end_failures": fleet.tries.failures(r.id),
    }
