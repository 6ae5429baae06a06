"""Which replica takes the next request: filter, score, pick. PURE.

Least queue depth, ties at random. Depth is our own in-flight count over all workers (exact) plus what the
replica reports beyond it (others' traffic, up to a second old): every figure of SGLang's lags, our own never
does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

BASE_EJECTION_SECONDS = 1.0
MAX_EJECTION_SECONDS = 30.0
# Envoy's default for consecutive gateway errors (`outlier_detection.consecutive_5xx`).
CONSECUTIVE_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Health:
    """Passive health of one upstream as this worker saw it.

    `errors`: consecutive failures (5xx, died, timeout; never 4xx). `ejections`: how often in a row it was
    ejected, which sets the back-off. `until`: monotonic seconds, 0 when in rotation. `unreachable`: nothing
    listened there at the last failure, which was at `last` (monotonic seconds).
    """

    errors: int = 0
    ejections: int = 0
    until: float = 0.0
    unreachable: bool = False
    last: float = 0.0


HEALTHY = Health()


def failed(health: Health, now: float, *, unreachable: bool = False) -> Health:
    """After one failure: five in a row, or one refused dial, eject for 1 s, 2 s, 4 s ... at most 30 s.

    Many requests fail together when a replica dies: while it is ejected they do not lengthen the pause.
    """
    if now < health.until:
        unreachable = health.unreachable or unreachable
        return Health(health.errors, health.ejections, health.until, unreachable, now)
    errors = health.errors + 1
    if not unreachable and errors < CONSECUTIVE_ERRORS:
        return Health(errors, health.ejections, health.until, health.unreachable, now)
    pause = min(MAX_EJECTION_SECONDS, BASE_EJECTION_SECONDS * 2 ** min(health.ejections, 16))
    return Health(0, health.ejections + 1, now + pause, unreachable, now)


class Candidate(Protocol):
    """What choosing needs to know of an upstream."""

    @property
    def id(self) -> str: ...
    @property
    def health(self) -> Health: ...


U = TypeVar("U", bound=Candidate)


def choose(
    upstreams: Sequence[U],
    *,
    depth: Callable[[U], int | None],
    now: float,
    avoid: Collection[str],
    pick: Callable[[Sequence[U]], U],
) -> U | None:
    """The upstream for the next request, or None: wait.

    `depth` is None when an upstream has its window's worth of our requests. `avoid` holds ids this request
    already failed on: taken only when no other is in rotation at all. When all are ejected the ones that at
    least answer dials are used rather than none, and without those the others, once a second.
    """
    usable = [u for u in upstreams if u.health.until <= now]
    if not usable:
        usable = [u for u in upstreams if not u.health.unreachable]
    if not usable:
        usable = [u for u in upstreams if u.health.last + BASE_EJECTION_SECONDS <= now]
    if avoid:
        usable = [u for u in usable if u.id not in avoid] or usable
    best: list[U] = []
    least = 0
    for u in usable:
        d = depth(u)
        if d is None:
            continue
        if not best or d < least:
            best, least = [u], d
        elif d == least:
            best.append(u)
    if not best:
        return None
    return best[0] if len(best) == 1 else pick(best)
