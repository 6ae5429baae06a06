"""What goes wrong, in an order that the seed decides."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from tests.chaos.bed import Bed, Replica, until

DECK = (
    "kill", "hang", "slow", "tear", "reset", "drop", "queue-full", "exit",
    "worker", "controller", "blackout", "kill", "hang", "tear", "reset",
)  # fmt: skip


class Faults:
    """Deals one deck after another, shuffled. `long`: some blackouts last until the controller, too, calls no
    replica ready (about 20 s). Mutable: `counts`, `blackout` (no replica lives now).
    """

    def __init__(self, bed: Bed, seed: int, *, long: bool) -> None:
        self._bed = bed
        self._long = long
        self._rng = random.Random(f"{seed}/faults")
        self._tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()
        self.blackout = False
        self.decks = 0

    async def run(self) -> None:
        """Until cancelled. Raises BedError where a replica cannot be started again."""
        while True:
            deck = list(DECK)
            self._rng.shuffle(deck)
            for fault in deck:
                await asyncio.sleep(self._rng.uniform(0.2, 0.8))
                await self._deal(fault)
            self.decks += 1

    async def heal(self) -> None:
        """Everything well again. Raises BedError."""
        await self._spells_over()
        await asyncio.gather(*(replica.heal() for replica in self._bed.replicas))
        await self._bed.all_ready()

    async def _spells_over(self) -> None:
        """Wait for the faults that last; not by `gather`, which would cancel them with its caller."""
        while self._tasks:
            task = next(iter(self._tasks))
            await asyncio.wait((task,))
            self._tasks.discard(task)
            task.result()

    async def _deal(self, fault: str) -> None:
        rng = self._rng
        seconds, number = rng.uniform(0.3, 1.5), rng.randint(1, 4)
        if fault in ("worker", "controller"):
            self.counts[fault] += self._bed.kill_one(fault, rng.choice)
            return
        if fault == "blackout":
            await self._blackout(seconds)
            return
        replica = rng.choice(self._bed.replicas)
        if replica.busy or not replica.alive:
            replica = next((r for r in self._bed.replicas if r.alive and not r.busy), replica)
        if replica.busy:
            return
        self.counts[fault] += 1
        if fault in ("tear", "drop", "queue-full"):
            await replica.fault(fault, number)
        elif fault == "reset":
            await replica.fault(fault)
        else:
            replica.busy = True
            self._tasks.add(asyncio.ensure_future(self._spell(replica, fault, seconds)))

    async def _spell(self, replica: Replica, fault: str, seconds: float) -> None:
        """A fault that lasts."""
        try:
            match fault:
                case "kill":
                    replica.kill()
                case "exit":
                    await replica.fault("exit")
                case "hang":
                    await replica.fault("hang")
                    seconds *= 3  # past --upstream-timeout for some
                case "slow":
                    await replica.fault("slow", 20)
            await asyncio.sleep(seconds)
            await replica.heal()
        finally:
            replica.busy = False

    async def _blackout(self, seconds: float) -> None:
        """No replica at all: what comes now is held. A long one lasts until the controller says so too."""
        await self._spells_over()
        long = self._long and self.counts["blackout"] % 3 == 2
        self.counts["blackout"] += 1
        self.counts["long blackout"] += long
        for replica in self._bed.replicas:
            replica.busy = True
            replica.kill()
        self.blackout = True
        try:
            if long:
                await until("no replica ready", self._none_ready, 60)
            await asyncio.sleep(seconds)
        finally:
            self.blackout = False
            for replica in self._bed.replicas:
                replica.start()
                replica.busy = False
        await asyncio.gather(*(replica.heal() for replica in self._bed.replicas))

    async def _none_ready(self) -> bool:
        return await self._bed.ready() == 0
