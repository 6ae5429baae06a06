"""When a replica is alive, hung or lost, and when the evidence is too odd to act on.

PURE. Two rules stand behind all of it: a replica whose tokens flow or that answers is alive, whatever one
probe or one list of the provisioner says; and when everything fails at once the fault is ours (network,
`~/.sky`, another API server), so nothing is ended or replaced for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal

FAILURES_NOT_READY: Final = 2  # probes in a row; SGLang misses single ones while it compiles a kernel
HUNG_AFTER: Final = 20.0  # s; SGLang's own health check gives up at 20 s (SGLANG_HEALTH_CHECK_TIMEOUT)
GRACE: Final = 600.0  # s after the first READY: the first requests compile kernels, 64-70 s each was measured
FREEZE_MOST: Final = 1800.0  # s a freeze may last while the provisioner is not certain of any loss


UNKNOWN_LIVES: Final = (
    "it answers, and is not listed any more: it cannot be ended from here and bills on. End its machine in"
    " the cloud's console, or give SkyPilot back the state (~/.sky) that knows it"
)


Listed = Literal["alive", "run", "machine", "unreachable", "absent", "unknown"]
"""By the provisioner: alive, what of it has ended (provisioners.Ended), or not there; unknown: no answer."""
CERTAIN: Final = frozenset({"run", "machine", "absent"})  # seen by one who can see it


@dataclass(frozen=True, slots=True)
class Signs:
    """What is known about one replica that has a machine. Times are unix seconds; None = never, or
    unknown."""

    listed: Listed = "unknown"
    detail: str = ""  # why it is dead, or what the last failed probe said
    probe_failures: int = 0  # in a row
    failing_since: float | None = None  # the first of them
    turned_away: bool = False  # the last probe was answered 503 at once: it drains (SIGTERM) or starts
    chunk_at: float | None = None  # the board's chunk counter last moved
    running: int = 0  # requests the replica says it runs (or that we have in flight there)
    stamp_at: float | None = None  # `loads[].timestamp` last moved; stands still when the scheduler is frozen
    stamped: bool = False  # it reports such a timestamp at all
    ready_at: float | None = None  # first READY
    generation: float | None = None  # tokens per second

    @property
    def ended(self) -> bool:
        """It is no replica any more, by the provisioner's list."""
        return self.listed not in ("alive", "unknown")


def recent(at: float | None, now: float, within: float) -> bool:
    return at is not None and now - at < within


def hung(signs: Signs, now: float, *, grace: float = GRACE) -> bool:
    """Busy for 20 s without a chunk, its load report stands still, and `/health` failed; not in the first
    minutes."""
    return (
        signs.running > 0
        and signs.probe_failures > 0
        and signs.stamped
        and not recent(signs.chunk_at, now, HUNG_AFTER)
        and not recent(signs.stamp_at, now, HUNG_AFTER)
        and signs.ready_at is not None
        and not recent(signs.ready_at, now, grace)
    )


def not_ready(signs: Signs, now: float, *, grace: float = GRACE) -> bool:
    """Out of rotation? Two failed probes in a row (one, if it is hung or its machine is gone) and no sign of
    life; or two that were turned away, whatever still flows: SGLang ends its streams after SIGTERM and takes
    requests until its last moment, and those die with it."""
    if signs.turned_away and signs.probe_failures >= FAILURES_NOT_READY:
        return True
    if signs.probe_failures == 0 or recent(signs.chunk_at, now, HUNG_AFTER):
        return False
    if signs.ended or hung(signs, now, grace=grace):
        return True
    return signs.probe_failures >= FAILURES_NOT_READY and not recent(signs.stamp_at, now, HUNG_AFTER)


def lost(signs: Signs, now: float) -> Literal["crashed", "preempted"] | None:
    """Its machine or process is gone by the provisioner's list, and nothing contradicts that.

    For a replica that was READY once a failed probe must agree; one that never was has nothing to answer
    with.
    """
    if not signs.ended:
        return None
    if signs.ready_at is not None and (signs.probe_failures == 0 or recent(signs.chunk_at, now, 2.0)):
        return None
    return "crashed" if signs.listed == "run" else "preempted"


def expired(signs: Signs, now: float, *, threshold: float, grace: float = GRACE) -> bool:
    """Probes have failed for the YAML's consecutive_failure_threshold_timeout, the first minutes apart, and
    no token flows: a server that drains may take longer than that over its last streams."""
    if signs.failing_since is None or signs.probe_failures == 0 or recent(signs.chunk_at, now, HUNG_AFTER):
        return False
    since = signs.failing_since
    if signs.listed == "alive":
        since = max(since, (signs.ready_at or 0.0) + grace)
    return now - since >= threshold


def frozen(replicas: Sequence[Signs], now: float, *, period: float, threshold: float) -> str | None:
    """Why nothing may be ended or replaced for now; None when the evidence is sound.

    `replicas`: those that have a machine and were READY. Fewer than two prove nothing: one alone that fails
    has failed. `period`: seconds within which all of their probes must see that the network is gone. When it
    ends although the probes go on failing, and real losses are dealt with:
    * at once, when the provisioner is certain that one of them has ended;
    * all gone from the list: after `threshold`, for that is two witnesses;
    * machines that are well, or that nobody can reach: after FREEZE_MOST;
    * while the provisioner does not answer: never. Nothing could be launched in their place anyhow.
    """
    if len(replicas) < 2:
        return None
    if all(s.listed == "absent" for s in replicas):
        if all(s.probe_failures and expired(s, now, threshold=threshold) for s in replicas):
            return None
        return f"the provisioner suddenly knows none of the {len(replicas)} replicas"
    failing = [s.failing_since for s in replicas if s.failing_since is not None and s.probe_failures]
    if len(failing) < len(replicas) or max(failing) - min(failing) > period:
        return None
    if any(s.listed in CERTAIN for s in replicas):
        return None
    if now - max(failing) >= FREEZE_MOST and all(s.listed != "unknown" for s in replicas):
        return None
    return f"all {len(replicas)} replicas fail since the same moment"


def estimate(
    history: Collection[tuple[str, float]], order: Sequence[str], phase: str | None, elapsed: float
) -> float | None:
    """Seconds until READY: medians of past cold starts, from the present phase on, less what has passed of
    it.

    `history` holds (phase, seconds) of past cold starts; None when it says nothing about what is to come. A
    phase that takes longer than ever counts zero, so the estimate stands still instead of going negative.
    """
    times: dict[str, list[float]] = {}
    for name, seconds in history:
        times.setdefault(name, []).append(seconds)
    ahead = order[order.index(phase) :] if phase in order else order
    medians = {name: _median(times[name]) for name in ahead if name in times}
    if not medians:
        return None
    if phase in medians:
        medians[phase] = max(0.0, medians[phase] - elapsed)
    return sum(medians.values())


def _median(values: Sequence[float]) -> float:
    middle = sorted(values)
    return (middle[(len(middle) - 1) // 2] + middle[len(middle) // 2]) / 2
