"""What a tick knows of the world, and what it means for one replica: the raw material of health.py's
rules."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from replicas.board import Board
from replicas.health import Listed, Signs, recent
from replicas.lifecycle import Replica
from replicas.loads import Load
from replicas.probe import Probed
from replicas.provisioners import Instance, InstancesUnknown, Other, Provisioner

log = logging.getLogger(__name__)

LOOK_WAIT: Final = 0.2  # s that a tick waits for a look; a slower one is used by a later tick
SPEED_MOST: Final = 10.0  # s; an older report says nothing of the speed of now
DOUBT: Final = 10.0  # s; one that still does not answer is asked about again
LOOK_MOST: Final = 300.0  # s; a look that takes longer has failed


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a tick knows of the world. `instances` None = the provisioner could not say."""

    now: float
    instances: Mapping[str, Instance] | None
    looked: int  # number of that look
    probes: Mapping[str, Probed]
    loads: Mapping[str, Load]
    released: Callable[[Replica], bool]  # no worker can still choose it, and nothing is in flight there

    def instance(self, id: str) -> Instance | None:
        return None if self.instances is None else self.instances.get(id)

    def answers(self, id: str) -> bool:
        """The last probe was answered with 200."""
        probed = self.probes.get(id)
        return probed is not None and probed.failures == 0


def learned(r: Replica, instance: Instance, price: float | None) -> dict[str, Any]:
    """What a look at its machine changes in the row. `price`: what a person gave, $/h; a catalogue's 0
    (Kubernetes, Slurm) is no price then. What is not known this time stays as it was."""
    said = {
        "url": instance.url or None,
        "hourly_cost": instance.hourly_cost or price or instance.hourly_cost,
        "region": instance.region or None,
        "spot": instance.spot,
    }
    return {name: value for name, value in said.items() if value not in (None, getattr(r, name))}


def silent(rows: Iterable[Replica], probes: Mapping[str, Probed]) -> set[str]:
    """Those that answered before and do not now: the provisioner may not know yet that they are gone."""
    return {r.id for r in rows if r.ready_at is not None and probes.get(r.id, Probed()).failures}


class Lookout:
    """Looks at what the provisioner has, one look at a time; it may take longer than a tick.

    Mutable: the last answer and its number, which grows with each look begun: a look that began before a
    replica was launched says nothing about that replica. And when each replica that does not answer was last
    asked about afresh. `others`: what is not ours and looks as if it were these services'; nothing is
    concluded from it. `on_news` is called when a look is due at once, and when no tick waits for one any more
    and it says something new.
    """

    def __init__(
        self,
        provisioner: Provisioner,
        every: float,
        services: Collection[str] = (),
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self.instances: Mapping[str, Instance] | None = None
        self.others: Sequence[Other] = ()
        self._services = services
        self.number = 0  # of the look that `instances` comes from
        self.begun = 0  # number of the last one begun
        self._provisioner = provisioner
        self._every = every
        self._begun_at = float("-inf")
        self._looking: asyncio.Task[None] | None = None
        self._on_news = on_news
        self._late = False  # no tick waits for the look under way
        self._outdated = False  # what exists has changed since the last look began
        self._failed = False
        self._doubted: dict[str, float] = {}

    def __repr__(self) -> str:
        found = "unknown" if self.instances is None else len(self.instances)
        return f"<Lookout number={self.number} instances={found}>"

    def outdate(self) -> None:
        """A launch or an end has come to its end: where a new replica is reached, only a look that begins
        from now on can tell."""
        self._outdated = True
        self._on_news()

    async def look(self, now: float, doubts: Collection[str] = ()) -> None:
        """A look, if one is due: by the time, or at once.

        `doubts`: ids whose probes fail; for each new one it is due, and trusts no memory.
        """
        self._doubted = {id: at for id, at in self._doubted.items() if id in doubts}
        # A clock that was set back puts no look off.
        fresh = frozenset(id for id in doubts if not 0 <= now - self._doubted.get(id, -DOUBT) < DOUBT)
        due = fresh or self._outdated or not 0 <= now - self._begun_at < self._every
        if self._looking is None and due:
            self._outdated = self._late = False
            self.begun += 1
            self._begun_at = now
            self._doubted.update(dict.fromkeys(fresh, now))
            self._looking = asyncio.create_task(self._look(self.begun, fresh), name="instances")
        if self._looking is not None:
            _, late = await asyncio.wait([self._looking], timeout=LOOK_WAIT)
            self._late = bool(late)

    async def close(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _look(self, number: int, fresh: Collection[str]) -> None:
        before = self.instances
        try:
            async with asyncio.timeout(LOOK_MOST):
                self.instances = await self._provisioner.instances(fresh)
            self._failed = False
        except Exception as error:
            if not self._failed:
                level = logging.WARNING if isinstance(error, InstancesUnknown) else logging.ERROR
                log.log(level, "what exists is not known: %s; nothing is concluded from that", error)
            self._failed, self.instances = True, None
        finally:
            self.number = number
        if self._late and self.instances != before:
            self._on_news()
        try:
            async with asyncio.timeout(LOOK_MOST):
                self.others = await self._provisioner.others(self._services)
        except Exception:  # only shown
            log.debug("what is not ours could not be told", exc_info=True)
        finally:
            self._looking = None
            if self._outdated:
                self._on_news()


class Witness:
    """Turns evidence into `Signs`. Mutable: when each replica's chunk counter last moved, and since which
    look the provisioner's list may be believed about it."""

    def __init__(self) -> None:
        self._chunks: dict[str, tuple[int, float | None]] = {}
        self._launched: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Witness of {sorted(self._chunks)}>"

    def launched(self, id: str, look: int) -> None:
        """It exists since: only looks with a higher number know of it."""
        self._launched[id] = look

    def forget(self, id: str) -> None:
        self._chunks.pop(id, None)
        self._launched.pop(id, None)

    def signs(self, r: Replica, seen: Evidence, board: Board) -> Signs:
        probed, load = seen.probes.get(r.id, Probed()), seen.loads.get(r.id, Load())
        listed: Listed = "unknown"
        detail = probed.error
        speed = load.generation if recent(load.at, seen.now, SPEED_MOST) else None
        if seen.instances is not None and seen.looked > self._launched.get(r.id, 0):
            instance = seen.instance(r.id)
            listed = "absent" if instance is None else "alive" if instance.alive else instance.ended
            if instance is not None and not instance.alive:
                detail = instance.detail
            elif instance is not None and not load.supported:
                speed = instance.generation
        return Signs(
            listed=listed,
            detail=detail,
            probe_failures=probed.failures,
            failing_since=probed.failing_since,
            turned_away=probed.turned_away,
            chunk_at=self._chunk_at(r, board, seen.now),
            running=max(load.running, board.in_flight(r.slot)),
            stamp_at=load.stamp_at,
            stamped=load.stamp is not None,
            ready_at=r.ready_at,
            generation=speed,
        )

    def _chunk_at(self, r: Replica, board: Board, now: float) -> float | None:
        count, at = self._chunks.get(r.id, (None, None))
        current = board.chunks(r.slot)
        if current != count:
            at = None if count is None else now
            self._chunks[r.id] = (current, at)
        return at
