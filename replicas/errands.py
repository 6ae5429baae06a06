"""Launches and terminations: tasks that go on between ticks, one at most per replica. Their outcomes wait in
here for the next tick."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from replicas.plans import Plan
from replicas.provisioners import Infeasible, LaunchError, NoCapacity, Provisioner, SetUpFailed
from replicas.spec import Service

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a launch or a termination ended."""

    id: str
    kind: Literal[
        "launched",
        "no_capacity",
        "infeasible",
        "set_up_failed",
        "try_again",
        "launch_failed",
        "gone",
        "not_gone",
    ]
    reason: str = ""


class Errands:
    """Mutable: the tasks under way and the outcomes not yet taken. `on_end` is called after each."""

    def __init__(
        self, provisioner: Provisioner, on_end: Callable[[], None], mask: Callable[[str], str]
    ) -> None:
        self._provisioner = provisioner
        self._mask = mask  # for our own log; who takes the outcomes masks them
        self._on_end = on_end
        self._launches: dict[str, asyncio.Task[None]] = {}
        self._terminations: dict[str, asyncio.Task[None]] = {}
        self._outcomes: list[Outcome] = []

    def __repr__(self) -> str:
        return f"<Errands launching={sorted(self._launches)} terminating={sorted(self._terminations)}>"

    def __contains__(self, id: str) -> bool:
        return id in self._launches or id in self._terminations

    def __bool__(self) -> bool:
        return bool(self._launches or self._terminations)

    def take(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def launch(self, id: str, service: Service, env: Mapping[str, str], plan: Plan) -> None:
        self._spawn(self._launches, id, self._launch(id, service, env, plan), f"launch {id}")

    def terminate(self, id: str) -> None:
        """A launch of the same id is cancelled first, which undoes nothing; the termination does, at a later
        call."""
        if id in self._launches:
            self._launches[id].cancel()
        elif id not in self._terminations:
            self._spawn(self._terminations, id, self._terminate(id), f"terminate {id}")

    async def close(self) -> None:
        """Let go of everything; what exists stays as it is, for the next controller to adopt."""
        tasks = [*self._launches.values(), *self._terminations.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _spawn(
        self, tasks: dict[str, asyncio.Task[None]], id: str, work: Coroutine[Any, Any, None], name: str
    ) -> None:
        task = tasks[id] = asyncio.create_task(work, name=name)

        def ended(_: asyncio.Task[None]) -> None:
            del tasks[id]
            self._on_end()

        task.add_done_callback(ended)

    async def _launch(self, id: str, service: Service, env: Mapping[str, str], plan: Plan) -> None:
        try:
            await self._provisioner.launch(id, service, env, plan)
        except NoCapacity as error:
            self._outcomes.append(Outcome(id, "no_capacity", error.reason))
        except Infeasible as error:
            self._outcomes.append(Outcome(id, "infeasible", error.reason))
        except SetUpFailed as error:
            self._outcomes.append(Outcome(id, "set_up_failed", error.reason))
        except LaunchError as error:
            kind: Literal["launch_failed", "try_again"] = "launch_failed" if error.permanent else "try_again"
            self._outcomes.append(Outcome(id, kind, error.reason))
        except Exception as error:  # a fault of ours or of an SDK: try again, until the provision timeout
            told = self._mask(traceback.format_exc())  # SkyPilot may tell what it was given
            log.error("the launch of %s failed in an unexpected way: %s", id, told)
            self._outcomes.append(Outcome(id, "try_again", f"{type(error).__name__}: {error}"))
        else:
            self._outcomes.append(Outcome(id, "launched"))

    async def _terminate(self, id: str) -> None:
        try:
            await self._provisioner.terminate(id)
        except Exception as error:
            self._outcomes.append(Outcome(id, "not_gone", str(error) or type(error).__name__))
        else:
            self._outcomes.append(Outcome(id, "gone"))
