"""From a target to what must be done: a list of actions, each with its reason. The caller does them.

PURE. Applied to its own result, a plan is empty: `plan(target, apply(plan(target, replicas)))` is `()`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from replicas.lifecycle import CAPACITY, COMING, SERVING, Replica, State


@dataclass(frozen=True, slots=True)
class Launch:
    reason: str


@dataclass(frozen=True, slots=True)
class Resume:
    """A replica that drains for scale-down goes back into rotation: cheaper than any launch."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drain:
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """A start that is not wanted any more (no failure), or the clean-up of a FAILED replica."""

    id: str
    reason: str


Action = Launch | Resume | Drain | Terminate


def plan(
    target: int,
    why: str,
    replicas: Sequence[Replica],
    *,
    in_flight: Mapping[str, int],
    waiting: int,
    unlaunched: Collection[str] = (),
    written_off: Collection[str] = (),
    outdated: Collection[str] = (),
    kept: Collection[str] = (),
    may_launch: bool = True,
) -> tuple[Action, ...]:
    """What brings `replicas` to `target`.

    `unlaunched`: ids of coming replicas that have no machine yet. `written_off`: NOT_READY ids past their
    threshold that are kept until a replacement is READY; they do not count. `outdated`: ids started from an
    older YAML, the first to go. `kept`: FAILED ids whose machines a person wants to look at. `why` is the
    decision's reason and becomes part of each action's.

    While anybody waits nothing that is starting is ended, and a READY replica is not given up in its place.
    """
    actions: list[Action] = [
        Terminate(r.id, f"{r.failure}: {r.reason}")
        for r in replicas
        if r.state is State.FAILED and r.id not in kept
    ]
    capacity = [r for r in replicas if r.state in CAPACITY and r.id not in written_off]
    missing = target - len(capacity)
    if missing > 0:
        resumable = [r for r in replicas if r.state is State.DRAINING and r.resumable and not r.failing_since]
        resumable.sort(key=lambda r: (r.id in outdated, -r.n))
        actions += [Resume(r.id, f"demand is back: {why}") for r in resumable[:missing]]
        if may_launch:
            actions += [Launch(why)] * (missing - len(resumable))
    elif missing < 0:
        # Not ready first and what has no machine before what bills; then of an old YAML; then the fewest in
        # flight; among equals the oldest, as the newest was started for the latest demand.
        def order(r: Replica) -> tuple[bool, bool, bool, bool, int, int]:
            coming = r.state in COMING
            return (
                not (coming and r.id in unlaunched),
                not coming,
                r.state is State.READY,
                r.id not in outdated,
                in_flight.get(r.id, 0),
                -r.n if coming else r.n,
            )

        candidates = [r for r in capacity if r.state in SERVING] if waiting else capacity
        spare = len(candidates) - target
        actions += [_end(r, why) for r in sorted(candidates, key=order)[: max(0, spare)]]
    return tuple(actions)


def _end(replica: Replica, why: str) -> Action:
    if replica.state in SERVING:
        return Drain(replica.id, why)
    return Terminate(replica.id, f"not wanted any more: {why}")
