"""Turns the engine's crank in real time: one step after the other, each as long as the engine says."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from .engine import Engine, Sequence

CATCH_UP = 0.05  # seconds that a busy machine may lag and still make up for; more than that is lost


class Runner:
    """Runs steps while there is work. Mutable: `frozen` (a hung or dead scheduler) and `slowness` (1.0: as
    modelled).
    """

    def __init__(
        self,
        engine: Engine,
        on_step: Callable[[list[Sequence]], None],
        on_begin: Callable[[], None],
        *,
        speedup: float,
        jitter: float,
        seed: int,
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_begin = on_begin
        self._speedup = speedup
        self._jitter = jitter
        self._rng = random.Random(seed)
        self._timer: asyncio.Handle | None = None
        self._due = 0.0
        self._finish_pending = False
        self.frozen = False
        self.slowness = 1.0

    def kick(self) -> None:
        """There is work (or may be): run. What arrives in the same turn of the loop meets in one queue."""
        if self._timer is None and not self.frozen:
            loop = asyncio.get_running_loop()
            self._due = loop.time()
            self._timer = loop.call_soon(self._finish if self._finish_pending else self._begin)

    def freeze(self) -> None:
        """Stop in the middle of a step, as a hung scheduler does."""
        self.frozen = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def thaw(self) -> None:
        """Go on."""
        self.frozen = False
        self.kick()

    def draw(self) -> float:
        """By how much the next step is longer than modelled; 1.0 without jitter."""
        return self._rng.uniform(1.0 - self._jitter, 1.0 + self._jitter)

    def _begin(self) -> None:
        seconds = self._engine.begin()
        self._on_begin()
        if seconds is None:
            self._timer = None
            return
        seconds *= self.draw()
        loop = asyncio.get_running_loop()
        self._due = max(self._due, loop.time() - CATCH_UP) + seconds * self.slowness / self._speedup
        self._finish_pending = True
        self._timer = loop.call_at(self._due, self._finish)

    def _finish(self) -> None:
        self._finish_pending = False
        self._timer = None
        stepped = self._engine.finish()
        self._on_step(stepped)
        if self._timer is None and not self.frozen:
            # call_soon, not a call: a step that is already due must not starve the connections
            self._timer = asyncio.get_running_loop().call_soon(self._begin)
