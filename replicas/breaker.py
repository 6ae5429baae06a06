"""The launch breaker: what failed starts cost, at most.

PURE. A start that failed for good (permanent launch error, `run` ended before READY, past the initial delay)
opens the breaker: no launch for 30 s, 60 s, 120 s, ... 6 h, and after 3 failed starts in a row none at all
until a person says `gateway retry` or the YAML changes. Without it a `run` that exits 1 would be launched
again for each retry of each client: $60 an hour for nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Final

COOL_DOWN_FIRST: Final = 30.0  # s
COOL_DOWN_MOST: Final = 6 * 3600.0  # s
FAILURES_MOST: Final = 3  # failed starts in a row until only a person helps
RETRY_AFTER_MOST: Final = 60  # s; older openai-python stop retrying when told to wait longer


@dataclass(frozen=True, slots=True)
class Breaker:
    """Of one service. Closed when new; stored as JSON, so that a restart forgets no failure."""

    spec_hash: str = ""  # failures belong to one YAML
    failures: int = 0  # failed starts in a row
    cool_downs: int = 0  # how often it has cooled down; a READY replica resets it, `retry` does not
    cool_until: float = 0.0  # unix seconds
    cause: str = ""
    quiet: bool = False  # the cool-down only paces launches; those who wait go on waiting

    def blocked(self) -> bool:
        return self.failures >= FAILURES_MOST

    def may_launch(self, now: float) -> bool:
        return not self.blocked() and now >= self.cool_until

    def ends_holds(self, now: float) -> bool:
        """Whether those who wait are told the cause instead of waiting on."""
        return self.blocked() or (now < self.cool_until and not self.quiet)

    def retry_after(self, now: float) -> int:
        """For the client, 1..60 s. Blocked: 60, whatever the clock says."""
        left = float(RETRY_AFTER_MOST) if self.blocked() else self.cool_until - now
        return max(1, min(RETRY_AFTER_MOST, int(-(-left // 1))))

    def message(self, now: float) -> str:
        """One sentence for the client and for `gateway status`; "" while launches are allowed."""
        if self.blocked():
            return (
                f"{self.failures} starts in a row failed, the last one: {self.cause}. "
                "Mend the cause, then run `gateway retry` (or start the gateway with a changed YAML)."
            )
        if now < self.cool_until:
            pause = _cool_down(self.cool_downs - 1)
            return f"the last start failed: {self.cause}. Another can be made {pause:.0f} s later."
        return ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(stored: dict[str, Any] | None, spec_hash: str) -> Breaker:
    """What was stored, or a closed one when nothing was or when the YAML has changed since."""
    if not stored or stored.get("spec_hash") != spec_hash:
        return Breaker(spec_hash)
    return Breaker(**stored)


def failed(breaker: Breaker, cause: str, now: float, *, counts: bool = True, quiet: bool = False) -> Breaker:
    """After a failed start.

    `counts=False`: cool down, but never block (no capacity is not the user's mistake). `quiet`: holds go on
    (a machine was taken from us while it started: try again, though not each second).
    """
    return replace(
        breaker,
        failures=breaker.failures + counts,
        cool_downs=breaker.cool_downs + 1,
        cool_until=now + _cool_down(breaker.cool_downs),
        cause=cause,
        quiet=quiet,
    )


def succeeded(breaker: Breaker) -> Breaker:
    """A replica became READY: all is forgotten."""
    return Breaker(breaker.spec_hash)


def retried(breaker: Breaker) -> Breaker:
    """A person asked for another try: now, and the failures are counted anew."""
    return replace(breaker, failures=0, cool_until=0.0)


def _cool_down(before: int) -> float:
    """Seconds, after `before` earlier ones: 30, 60, 120, ... 21600."""
    return min(COOL_DOWN_MOST, COOL_DOWN_FIRST * 2.0 ** min(before, 32))
