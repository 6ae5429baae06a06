"""Blocking work beside the event loop, in daemon threads."""
from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")


async def in_thread(work: Callable[[], T]) -> T:
    """Run blocking work in a daemon thread. Cancelling the wait does not stop the work.

    Not an executor's: those are joined when Python exits, and a launch may wait for hours.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            setter(value)

    def run() -> None:
        try:
            value = work()
        except (SystemExit, KeyboardInterrupt) as error:   # SkyPilot hands on what ended its own process
            end = RuntimeError(f"SkyPilot's own process was ended: {type(error).__name__} {error}".rstrip())
            outcome: tuple[Callable[[Any], None], Any] = (future.set_exception, end)
        except BaseException as error:
            outcome = (future.set_exception, error)
        else:
            outcome = (future.set_result, value)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, *outcome)

    threading.Thread(target=run, name="skypilot", daemon=True).start()
    return await future


def spawn(work: Callable[[], object], name: str) -> None:
    """Begin blocking work whose end nobody waits for; what it raises is logged."""

    def run() -> None:
        try:
            work()
        except Exception as error:
            log.info("%s: %s", name, error)

    threading.Thread(target=run, name=name, daemon=True).start()
