"""The real controller over the real SkyPilotProvisioner, over a SkyPilot in memory; a gateway to be killed.

Time is set by hand. A step lets every thread go on until it has ended or waits for something that the test
has not done yet (a launch that may not finish, a sleep): nothing depends on how busy this machine is.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from replicas.controller import Controller
from replicas.lifecycle import State
from replicas.provisioners.attendant import Attendant
from replicas.provisioners.skypilot import SkyPilotProvisioner
from replicas.table import Table

from ..controller.conftest import FakeClock, World
from ..provisioners.fake_sky import FakeSky

SETTLED = 5.0  # real seconds that a step may take, on a very busy machine
ADDRESS = "10.0.0.5:30000"
EFFECTS = ("launch", "stream_and_get", "api_cancel", "down")

COMMITS = {  # what is saved, by who saves it
    Controller._add.__code__: "a replica's number",
    Controller._save.__code__: "rows",
    Controller._publish.__code__: "a generation",
    Controller.set_limits.__code__: "limits",
    Controller.__init__.__code__: "the replicas' key",
    Table.__init__.__code__: "the owner",
}


class Killed(BaseException):
    """SIGKILL: nothing of the gateway goes on, and nothing is cleaned up."""


class Life:
    """One run of the gateway. It ends at its n-th touch of the world: before or after an effect."""

    def __init__(self, at: int | None = None) -> None:
        self.touches: list[str] = []
        self.at = at
        self.over = False
        self._lock = threading.Lock()

    def touch(self, what: str) -> None:
        with self._lock:
            self.go_on()
            self.touches.append(what)
            self.over = len(self.touches) == self.at
            self.go_on()

    def go_on(self) -> None:
        if self.over:
            if threading.current_thread().name in ("MainThread", "skypilot"):
                raise Killed
            raise RuntimeError("the gateway is dead")  # in a thread whose end nobody waits for


class MortalSky:
    """The SDK as one life of the gateway sees it."""

    def __init__(self, sky: FakeSky, life: Life) -> None:
        self._sky, self._life = sky, life

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._sky, name)
        if not callable(value) or isinstance(value, type):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if name not in EFFECTS:
                self._life.go_on()
                result = value(*args, **kwargs)
                self._life.go_on()
                return result
            self._life.touch(f"before sky.{name}")
            try:
                return value(*args, **kwargs)
            finally:
                self._life.touch(f"after sky.{name}")

        return call


class MortalTable(Table):
    """state.db as one life of the gateway sees it."""

    def __init__(self, path: Path, life: Life) -> None:
        self.life = life
        super().__init__(path)

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        outermost = durable and not self._depth
        self.life.go_on()
        with super()._transaction(durable=durable):
            yield
            if outermost:
                self.life.touch(f"before the commit of {self._what()}")
        if outermost:
            self.life.touch(f"after the commit of {self._what()}")

    def _what(self) -> str:
        names = {id(code): what for code, what in COMMITS.items()}
        frame = sys._getframe()
        while frame.f_back is not None and id(frame.f_code) not in names:
            frame = frame.f_back
        states = ", ".join(str(r.state) for r in self.replicas()) or "none"
        return f"{names.get(id(frame.f_code), '')} (now {states})"


class SimClock(FakeClock):
    """Threads that sleep by it wait until a test has set it far enough."""

    def __init__(self, sky: FakeSky) -> None:
        super().__init__()
        self._sky = sky

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds

        def waits() -> bool:
            return self.now < until and not self._sky.closing.is_set()

        with self._sky.holding(waits):
            while waits():
                time.sleep(0.001)
        if self._sky.closing.is_set():
            raise Killed


class SkyWorld(World):
    """A World whose machines are SkyPilot's. `mute`: ids that answer no probe; `network`: do packets pass."""

    def __init__(self, state_dir: Path) -> None:
        self.sky = FakeSky()
        self.life = Life()
        self.mute: set[str] = set()
        self.network = True
        self.loading = False
        self.ended = False
        super().__init__(state_dir)

    def start(self, *, yaml: str | None = None, kill_at: int | None = None, **settings: Any) -> None:
        """A new gateway on the same state dir and the same SkyPilot; the one before is dead."""
        self.life.over = True
        self._end_attendants()
        self.life = Life(kill_at)
        super().start(yaml=yaml, **settings)

    def open_table(self) -> Table:
        if not isinstance(self.clock, SimClock):
            self.clock = SimClock(self.sky)
        table = MortalTable(self.state_dir / "state.db", self.life)
        sky: Any = MortalSky(self.sky, self.life)
        self.provisioner: Any = SkyPilotProvisioner(
            self.state_dir,
            table.owner,
            sky=lambda: sky,
            clock=self.clock,
            wall=self.clock,
            sleep=self.clock.sleep,
        )
        return table

    async def step(self, seconds: float = 1.0) -> None:
        self.clock.now += seconds
        await self.settle()
        for id, target in self.prober.targets.items():
            self.prober.answers[id] = self.answer(id, target.url)
        self.prober.ask()
        await self.controller.tick()
        await self.settle()

    def answer(self, id: str, url: str) -> bool | str:
        if not self.network:
            return "no answer in 25 s"
        exposed = {address.rstrip("/") for address in self.sky.exposed.values()}
        here = bool(exposed & {url, url.partition("://")[2]})
        up = id in self.sky.machines and self.sky.jobs(id) > 0 and id not in self.sky.run_ended
        return True if up and here and not self.loading and id not in self.mute else "connection refused"

    async def settle(self) -> None:
        deadline, last, since = time.monotonic() + SETTLED, -1, time.monotonic()
        while (busy := self._busy()) > 0:
            now = time.monotonic()
            assert now < deadline, threading.enumerate()
            if busy != last:
                last, since = busy, now
            elif now - since > 0.05 and self.sky.held():
                break  # it waits for a lock that another one holds, who waits for the test
            await asyncio.sleep(0.0005)
        for _ in range(6):
            await asyncio.sleep(0)
        await self._attended()

    def _busy(self) -> int:
        threads = sum(thread.name == "skypilot" for thread in threading.enumerate())
        return threads - self.sky.held()

    async def _attended(self) -> None:
        """The attendants have found what there is to find."""
        deadline = time.monotonic() + 0.5
        sky = self.sky
        while time.monotonic() < deadline and not self.life.over:
            if sky.api_down or sky.endpoints_fail or not sky.exposed:
                return
            all_of_them = [t for t in threading.enumerate() if t.name.startswith("attendant")]
            threads = {t.name for t in all_of_them if isinstance(t, Attendant)}
            up = {name for name, c in sky.clusters.items() if c.status.value == "UP"}
            waits = up - (sky.tailed - sky.run_ended.keys())
            asking = any(not isinstance(t, Attendant) for t in all_of_them)
            if not asking and not any(thread.endswith(name) for thread in threads for name in waits):
                return
            await asyncio.sleep(0.0005)

    @property
    def service_status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.controller.status()["services"][0]
        return status

    @property
    def launched(self) -> list[str]:
        """Names, in the order in which they were asked for."""
        return [launch["cluster_name"] for launch in self.sky.launched]

    async def ready(self, n: int = 1, **settings: Any) -> list[str]:
        """`n` replicas that serve; their ids."""
        self.start(min_replicas=n, **settings)
        await self.steps(10, until=lambda: self.states.count(State.READY) == n)
        return [r.id for r in self.replicas]

    def _end_attendants(self) -> None:
        for thread in threading.enumerate():
            if isinstance(thread, Attendant):
                thread.stop()

    def end(self) -> None:
        if self.ended:
            return
        self.ended = self.life.over = True
        self.sky.clusters.clear()
        self.sky.closing.set()
        self.sky.may_finish.set()
        self.sky.submitting.set()
        self._end_attendants()
        for thread in threading.enumerate():
            if thread.daemon and thread.name.startswith(("attendant", "skypilot")):
                thread.join(10)
        self.table.close()
        self.board.close()


@pytest.fixture
def make_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], SkyWorld]]:
    """Builds worlds, each with a state dir of its own."""
    monkeypatch.setattr("replicas.provisioners.attendant.PAUSE_SECONDS", 0.005)
    worlds: list[SkyWorld] = []

    def build() -> SkyWorld:
        folder = tmp_path / f"world-{len(worlds)}"
        folder.mkdir()
        worlds.append(SkyWorld(folder))
        return worlds[-1]

    yield build
    for world in worlds:
        world.end()


@pytest.fixture
async def world(make_world: Callable[[], SkyWorld]) -> AsyncIterator[SkyWorld]:
    world = make_world()
    yield world
    world.life.over = False
    await world.controller.close()
