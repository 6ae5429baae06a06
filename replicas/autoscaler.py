"""How many replicas a service should have, and why.

PURE. `decide` is a function of the policy, what it remembers, the demand and the time; the controller calls
it each tick and stores nothing else. Asymmetric on purpose: from zero at once (a client is waiting), up only
on *sustained* demand (each replica may cost $60 an hour), down only after idling that is counted from the
last completion, never from the last arrival (SkyServe's rule kills a 30-minute generation that no new request
followed).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

QPS_WINDOW: Final = 60.0  # s over which arrivals are averaged, as in SkyServe
CANCEL_AFTER: Final = 60.0  # s without anybody; a client told `Retry-After: 60` is still coming


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits and speeds of one service: the YAML's `replica_policy`, flags and `gateway scale`, already
    merged."""

    min: int
    max: int  # 0 = paused
    overprovision: int = 0  # replicas more than the demand needs, while there is any demand
    target_in_flight: float | None = None  # per replica; None = the window, unless target_qps is given
    target_qps: float | None = None  # requests per second and replica
    upscale_delay: float = 300.0  # s the demand must stay above
    downscale_delay: float = 1200.0  # s the demand must stay below
    idle_timeout: float = 1200.0  # s without anything, then down to `min`
    cancel_after: float = CANCEL_AFTER


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of the service, and what it has."""

    waiting: int  # held requests
    in_flight: int  # over all its replicas
    arrived: bool  # a valid request came since the last tick (with `reject` nobody ever waits)
    qps: float  # arrivals per second over QPS_WINDOW
    asked_at: float  # last time anybody waited or arrived
    active_at: float  # last completion, last time something was in flight, or the newest first READY
    window: float  # requests that one replica takes at a time
    unlaunched: int  # of `coming`, those that have no machine yet (and cost nothing)
    coming: int  # PENDING, PROVISIONING, STARTING
    serving: int  # READY, NOT_READY


@dataclass(frozen=True, slots=True)
class Memory:
    """Since when the demand has been above or below what there is, and the least it asked for meanwhile."""

    above_since: float | None = None
    above_least: int = 0  # the fewest replicas wanted since `above_since`: that much is sustained
    below_since: float | None = None
    below_most: int = 0  # the most replicas wanted since `below_since`


@dataclass(frozen=True, slots=True)
class Decision:
    target: int
    code: str  # one of CODES; the label of gateway_decisions_total
    reason: str  # for log, status and people
    memory: Memory = Memory()


CODES: Final = (
    *("paused", "min_replicas", "max_replicas", "wake", "cold", "nobody_waits", "rising", "demand", "steady"),
    *("falling", "surplus", "idle"),
    *("blocked", "stopping"),  # of fleet.py: no launch is allowed; the gateway goes down
)


def wanted(policy: Policy, demand: Demand) -> tuple[int, str]:
    """Replicas that the present demand would fill (at most policy.max), and the arithmetic in words."""
    load = demand.waiting + demand.in_flight
    needs: list[tuple[int, str]] = []
    if policy.target_qps:
        why = f"{demand.qps:.2f}/s at {policy.target_qps:g}/s each"
        needs.append((ceil(demand.qps / policy.target_qps), why))
    if policy.target_in_flight or not policy.target_qps:
        each = policy.target_in_flight or demand.window
        needs.append((ceil(load / each), f"{load} request{'' if load == 1 else 's'} at {each:g} each"))
    want, why = max(needs)
    if load:
        want = max(want, 1)
    if want:
        want += policy.overprovision
    return min(want, policy.max), why


def decide(policy: Policy, memory: Memory, demand: Demand, now: float) -> Decision:
    """The number of replicas the service should have now. Never above policy.max nor below policy.min."""
    current = demand.coming + demand.serving
    load = demand.waiting + demand.in_flight
    if policy.max == 0:
        return Decision(0, "paused", "paused by --max 0")
    if current < policy.min:
        return Decision(policy.min, "min_replicas", f"at least {policy.min} replicas are asked for")
    if current > policy.max:
        return Decision(policy.max, "max_replicas", f"at most {policy.max} replicas are allowed")
    if current == 0:
        if demand.waiting or demand.arrived:
            asking = max(1, demand.waiting)
            return Decision(1, "wake", f"{asking} waiting and no replica: one start for all of them")
        return Decision(0, "cold", "no replica and nobody asks")
    if not load and demand.unlaunched and now - demand.asked_at >= policy.cancel_after:
        keep = max(policy.min, current - demand.unlaunched)
        if keep < current:
            return Decision(keep, "nobody_waits", "nobody waits any more, and the start has no machine yet")
    want, why = wanted(policy, demand)
    if want > current:
        return _above(policy, memory, current, want, why, now)
    if demand.coming or demand.waiting:
        return Decision(current, "steady", f"{demand.coming} starting, {demand.waiting} waiting")
    if not load and now - demand.active_at >= policy.idle_timeout and policy.min < current:
        return Decision(policy.min, "idle", f"idle for {now - demand.active_at:.0f} s")
    floor = max(want, policy.min, 1)
    if floor < current:
        return _below(policy, memory, current, floor, why, now)
    return Decision(current, "steady", why)


def _above(policy: Policy, memory: Memory, current: int, want: int, why: str, now: float) -> Decision:
    since = now if memory.above_since is None else memory.above_since
    least = want if memory.above_since is None else min(want, memory.above_least)
    if now - since >= policy.upscale_delay:
        return Decision(max(least, current + 1), "demand", f"{why}, for {now - since:.0f} s")
    left = policy.upscale_delay - (now - since)
    return Decision(current, "rising", f"{why}: {least} replicas in {left:.0f} s", Memory(since, least))


def _below(policy: Policy, memory: Memory, current: int, want: int, why: str, now: float) -> Decision:
    since = now if memory.below_since is None else memory.below_since
    most = want if memory.below_since is None else max(want, memory.below_most)
    if now - since >= policy.downscale_delay:
        return Decision(min(most, current), "surplus", f"{why}, for {now - since:.0f} s")
    memory = Memory(below_since=since, below_most=most)
    return Decision(current, "falling", f"{why}: fewer are enough", memory)
