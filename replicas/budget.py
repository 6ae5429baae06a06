"""What replicas cost at this moment and have cost within a day, from their rows. PURE.

For the limits only: what was really spent is the table's business. A replica whose price is not known costs
what its plan does, and nothing if that is not known either. Dollars, hours, unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from replicas import plans
from replicas.lifecycle import Replica, State
from replicas.plans import Menu, Spending

DAY: Final = 86_400.0  # s; a sliding day, so that midnight brings no new money
_FREE: Final = frozenset({State.PENDING, State.GONE})


def price(r: Replica, menu: Menu) -> float:
    """Dollars per hour. A catalogue's 0 (Kubernetes, Slurm) is no price where a person gave one."""
    return r.hourly_cost or menu.price(plans.read(r.plan)) or 0.0


def spending(replicas: Iterable[tuple[Replica, Menu]], now: float) -> Spending:
    """`replicas` of all services, those that ended within a day included."""
    hourly = day = 0.0
    for r, menu in replicas:
        dollars = price(r, menu)
        if r.state not in _FREE:
            hourly += dollars
        if r.launched_at is not None:
            end = r.since if r.state is State.GONE else now
            begin = max(r.launched_at, now - DAY)
            day += dollars * max(0.0, end - begin) / 3600
    return Spending(hourly, day)


def lost_to_spot(r: Replica) -> bool:
    """Whether its spot machine was taken from us."""
    return r.failure == "preempted" and on_spot(r) is True


def on_spot(r: Replica) -> bool | None:
    """Whether it runs on a spot machine, as placed; until that is known, as planned. None = not known."""
    return plans.read(r.plan).use_spot if r.spot is None else r.spot
