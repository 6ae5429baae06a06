"""What replicas have cost: the entries of the ledger, and what can be said about many of them.

PURE. All of it is an estimate: list prices times the time that a machine was known to exist. Discounts,
disks, traffic and the minutes before the first and after the last sight of a machine are not in it. Days are
those of UTC, as on the clouds' bills. Times are unix seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, get_args

By = Literal["day", "replica", "key"]
BYS: Final[tuple[str, ...]] = get_args(By)
HOUR: Final = 3600.0
_UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": HOUR, "d": 24 * HOUR}
_DURATION: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)")


@dataclass(frozen=True, slots=True)
class Waker:
    """Who made a service wake: the name of an API key and the id of a request, or "" where there was none."""

    key: str = ""
    request: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One replica at one price. A new price begins a new `part`; the parts of a replica do not overlap."""

    replica: str
    service: str
    begun: float  # its machine was first seen; before that, when the launch was decided
    until: float  # accounted up to here
    part: int = 1
    price: float | None = None  # dollars per hour of the whole replica; None = not known (yet)
    dollars: float = 0.0
    ready: float = 0.0  # seconds READY
    idle: float = 0.0  # seconds of those with nothing in flight
    plan: str = ""
    region: str = ""
    spot: bool | None = None  # None = not known
    key: str = ""  # the waker's
    request: str = ""
    closed: bool = False

    def __repr__(self) -> str:
        return f"<Entry {self.replica}/{self.part} {self.hours:.2f} h ${self.dollars:.2f}>"

    @property
    def hours(self) -> float:
        return (self.until - self.begun) / HOUR


@dataclass(frozen=True, slots=True)
class Sums:
    """Of the entries of one service. `priced`: seconds at a known price; `begun`: the earliest, if any."""

    dollars: float = 0.0
    priced: float = 0.0
    ready: float = 0.0
    idle: float = 0.0
    begun: float | None = None

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.dollars + other.dollars,
            self.priced + other.priced,
            self.ready + other.ready,
            self.idle + other.idle,
            min((b for b in (self.begun, other.begun) if b is not None), default=None),
        )

    @classmethod
    def of(cls, entry: Entry) -> Sums:
        priced = 0.0 if entry.price is None else entry.until - entry.begun
        return cls(entry.dollars, priced, entry.ready, entry.idle, entry.begun)


def summary(sums: Sums, replicas: int, now: float) -> dict[str, float | None]:
    """What the status says: `total` dollars; `idle_share` of the READY time; what `replicas` machines would
    have cost had they run all the time since the ledger began (`always_on`), at the average price paid; and
    what was `saved` against that, which several replicas at once can turn below zero. None = not known."""
    always_on = None
    if sums.priced > 0 and sums.begun is not None:
        always_on = replicas * (now - sums.begun) * sums.dollars / sums.priced
    return {
        "total": sums.dollars,
        "idle_share": sums.idle / sums.ready if sums.ready > 0 else None,
        "always_on": always_on,
        "saved": None if always_on is None else always_on - sums.dollars,
    }


def bill(entries: Iterable[Entry], by: str, now: float, since: float | None = None) -> dict[str, Any]:
    """The answer of GET /admin/cost: rows by UTC day, by replica (one for each price) or by the key that woke
    them, of the time after `since`. Raises ValueError for another `by`."""
    if by not in BYS:
        raise ValueError(f"by is one of {', '.join(BYS)}, not {by!r}")
    kept = [(e, _share(e, since)) for e in entries if e.dollars or e.until > e.begun]
    kept = [(e, share) for e, share in kept if share > 0]
    rows = {"day": _days, "replica": _replicas, "key": _keys}[by](kept, since)
    return {
        "estimate": True,
        "by": by,
        "since": since,
        "until": now,
        "total": sum(e.dollars * share for e, share in kept),
        "rows": rows,
    }


def _share(entry: Entry, since: float | None, until: float | None = None) -> float:
    """How much of the entry's time, 0..1, is in the span."""
    begun = entry.begun if since is None else max(entry.begun, since)
    end = entry.until if until is None else min(entry.until, until)
    if entry.until <= entry.begun:  # of an instant: there or not there
        return float(begun <= entry.begun and (until is None or entry.begun < until))
    return max(0.0, end - begun) / (entry.until - entry.begun)


def _replicas(kept: list[tuple[Entry, float]], since: float | None) -> list[dict[str, Any]]:
    return [
        {
            "replica": e.replica,
            "service": e.service,
            "plan": e.plan,
            "region": e.region,
            "spot": e.spot,
            "price": e.price,
            "from": e.begun if since is None else max(e.begun, since),
            "to": e.until,
            "open": not e.closed,
            "hours": e.hours * share,
            "dollars": e.dollars * share,
            "key": e.key,
            "request": e.request,
        }
        for e, share in sorted(kept, key=lambda pair: (pair[0].begun, pair[0].replica, pair[0].part))
    ]


def _keys(kept: list[tuple[Entry, float]], since: float | None) -> list[dict[str, Any]]:
    names = sorted({e.key for e, _ in kept})
    return [{"key": name, **_total([(e, s) for e, s in kept if e.key == name])} for name in names]


def _days(kept: list[tuple[Entry, float]], since: float | None) -> list[dict[str, Any]]:
    days: dict[str, list[tuple[Entry, float]]] = {}
    for entry, _ in kept:
        day = _midnight(entry.begun if since is None else max(entry.begun, since))
        while True:
            begun, day = day, day + timedelta(days=1)
            start = begun.timestamp() if since is None else max(begun.timestamp(), since)
            share = _share(entry, start, day.timestamp())
            days.setdefault(f"{begun:%Y-%m-%d}", []).append((entry, share))
            if day.timestamp() >= entry.until:
                break
    return [{"day": day, **_total(days[day])} for day in sorted(days)]


def _total(kept: list[tuple[Entry, float]]) -> dict[str, Any]:
    return {
        "replicas": len({e.replica for e, _ in kept}),
        "hours": sum(e.hours * share for e, share in kept),
        "dollars": sum(e.dollars * share for e, share in kept),
    }


def _midnight(at: float) -> datetime:
    return datetime.fromtimestamp(at, UTC).replace(hour=0, minute=0, second=0, microsecond=0)


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `30m`, `2h`, `7d`. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a duration such as 90s, 30m, 2h or 7d")
    return float(match[1]) * _UNITS[match[2]]


def moment(text: str, now: float) -> float:
    """The unix time of `7d` (ago), `2026-11-24` or `2026-11-24T18:00` (UTC unless it says otherwise).

    Raises ValueError.
    """
    if _DURATION.fullmatch(text.strip().lower()):
        return now - duration(text)
    try:
        at = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"{text!r} is neither a time ago such as 7d nor a date such as 2026-11-24") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
