"""The launches of one service that are under way: which plan each is on, what it has tried, what comes next.

Between the pure order of replicas/plans.py and the fleet, which calls it. No I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from replicas import budget, plans
from replicas.lifecycle import CAPACITY, Replica, State
from replicas.plans import Market, Menu, Plan, Spending
from replicas.tries import back_off

NEXT_PLAN: Final = 1.0  # s before the next plan is tried; the list through, it is the pauses below
PAUSE_FIRST: Final = 5.0  # s
PAUSE_MOST: Final = 60.0

Why = Literal["no_capacity", "infeasible", "try_again"]


@dataclass(frozen=True, slots=True)
class Turn:
    """The next attempt of a launch: on which plan, the `number`th of `of`, in how many seconds."""

    plan: Plan
    number: int
    of: int
    pause: float
    attempt: int

    def __str__(self) -> str:
        if self.of == 1:
            return f"next try in {self.pause:.0f} s"
        where = f"plan={self.number}/{self.of} attempt={self.attempt}"
        return f"next try in {self.pause:.0f} s: {where} ({self.plan.name})"


class Launches:
    """Mutable, by the fleet: the attempts of each launch, and the replicas that ended within a day."""

    def __init__(self, menu: Menu, past: Iterable[Replica] = ()) -> None:
        self.menu = menu
        self.elsewhere = Spending()  # what other services cost
        self._past = list(past)  # GONE
        self._failed: dict[str, int] = {}  # attempts, by replica
        self._infeasible: dict[str, set[str]] = {}  # names of plans that can never fit, by replica

    def __repr__(self) -> str:
        names = ", ".join(plan.name or "YAML" for plan in self.menu.plans)
        return f"<Launches {names} ({self.menu.market}) under way={sorted(self._failed)}>"

    # ------------------------------------------------------------ money

    def spending(self, rows: Collection[Replica], now: float) -> Spending:
        """Of this service alone."""
        return budget.spending([(r, self.menu) for r in (*rows, *self._past)], now)

    def refusal(self, rows: Collection[Replica], now: float) -> str | None:
        """Why money allows no further replica; None when it does."""
        limits = self.menu.options
        if limits.max_daily_cost is None and limits.max_hourly_cost is None:
            return None
        return plans.refusal(self.menu, self._all(rows, now))

    def _all(self, rows: Collection[Replica], now: float) -> Spending:
        ours = self.spending(rows, now)
        return Spending(ours.hourly + self.elsewhere.hourly, ours.day + self.elsewhere.day)

    def price(self, r: Replica) -> float | None:
        """Dollars per hour that a person gave for its plan."""
        return self.menu.price(plans.read(r.plan))

    # ------------------------------------------------------------ plans

    def choices(self, r: Replica, rows: Collection[Replica], now: float) -> tuple[Plan, ...]:
        """What `r` may be launched on, best first."""
        others = [other for other in rows if other.id != r.id]
        found = plans.choices(
            self.menu,
            now,
            losses=[lost.since for lost in (*others, *self._past) if budget.lost_to_spot(lost)],
            on_demand=sum(o.state in CAPACITY and budget.on_spot(o) is False for o in others),
            spending=self._all(others, now),
        )
        return tuple(plan for plan in found if plan.name not in self._infeasible.get(r.id, ()))

    def plan(self, r: Replica, rows: Collection[Replica], now: float) -> Plan:
        """The plan that `r` is on, with the variables and limits of today."""
        for plan in self.choices(r, rows, now):
            if plan.name == r.plan:
                return plan
        options = self.menu.options  # decided by a gateway with other flags
        mixed = self.menu.market is Market.MIXED
        return replace(plans.read(r.plan), chosen=mixed, envs=options.envs, secrets=options.secrets)

    def place(self, r: Replica, rows: Collection[Replica], now: float) -> tuple[int, int]:
        """`plan=2/3`: which of how many; (0, n) for a plan that would not be chosen any more."""
        names = [plan.name for plan in self.choices(r, rows, now)]
        return names.index(r.plan) + 1 if r.plan in names else 0, len(names)

    def attempt(self, r: Replica) -> int:
        return self._failed.get(r.id, 0) + 1

    def after(self, r: Replica, why: Why, rows: Collection[Replica], now: float) -> Turn | None:
        """What comes after an attempt that failed; None when nothing is left to try."""
        before = self.choices(r, rows, now)
        if why == "infeasible":
            self._infeasible.setdefault(r.id, set()).add(r.plan)
        options = self.choices(r, rows, now)
        if not options:
            return None
        names = [plan.name for plan in before]
        at = names.index(r.plan) if r.plan in names else -1
        plan = self.plan(r, rows, now) if why == "try_again" else plans.following(before, plans.read(r.plan))
        while why != "try_again" and plan not in options:
            plan = plans.following(before, plan)
        failed = self._failed[r.id] = self.attempt(r)
        pause = NEXT_PLAN
        if why == "try_again" or names.index(plan.name) <= at:  # once around
            pause = back_off((failed - 1) // len(options) + 1, PAUSE_FIRST, PAUSE_MOST)
        number = next((i for i, one in enumerate(options, 1) if one == plan), 0)
        return Turn(plan, number, len(options), pause, failed + 1)

    def ended(self, id: str) -> None:
        """The launch is over, one way or the other."""
        self._failed.pop(id, None)
        self._infeasible.pop(id, None)

    def gone(self, r: Replica, now: float) -> None:
        """It is verified gone; what it has cost, and that it was lost, counts for a day."""
        self.ended(r.id)
        day = now - budget.DAY
        self._past = [old for old in (*self._past, r) if old.state is State.GONE and old.since > day]
