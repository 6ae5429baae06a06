"""SkyPilot's API server: found, or started, before anything is asked of it, and why it cannot be used if so.

The SDK pickles: what one version writes, another may not read. So server and SDK must be the same version.
While they are not, or the server does not answer, nothing is launched and nothing is concluded; replicas go
on serving, and the first check that passes again ends the trouble.
"""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from replicas.provisioners import sdk

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Health, Sky

log = logging.getLogger(__name__)

START_PAUSE_SECONDS = 60.0   # after a start that failed
_MEANWHILE = "replicas go on serving, and nothing is launched until then"


class ServerTrouble(Exception):
    """The API server cannot be used; one sentence that says what to do.

    `answers`: it would take calls that need no pickles: `down` and `autostop`.
    """

    def __init__(self, words: str, *, answers: bool = False) -> None:
        super().__init__(words)
        self.answers = answers


class ApiServer:
    """Mutable: what was told last, and when a start failed; under its lock, one check at a time."""

    def __init__(
        self,
        *,
        start: Callable[[], None] = sdk.start_server,
        may_start: Callable[[], bool] = sdk.may_start_server,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.says = "SkyPilot API server: not asked yet"   # one line for people
        self.trouble = False
        self._start = start
        self._may_start = may_start
        self._clock = clock
        self._lock = threading.Lock()
        self._failed_at = float("-inf")

    def __repr__(self) -> str:
        return f"<ApiServer {self.says}>"

    def check(self, sky: Sky) -> None:
        """Return when it can be used; start a local one when there is none. Raises ServerTrouble."""
        with self._lock:
            health = sdk.health(sky)
            try:
                if health.status == "unhealthy" and self._begin(health):
                    health = sdk.health(sky, anew=True)
                _judge(health)
            except ServerTrouble as trouble:
                self._tell(str(trouble), trouble=True)
                raise
            self._tell(f"SkyPilot API server {health.url}, version {health.theirs}", trouble=False)

    def _begin(self, health: Health) -> bool:
        """Start a local one, if that may be; whether it was."""
        paused = self._clock() - self._failed_at < START_PAUSE_SECONDS
        if paused or not health.local or not self._may_start():
            return False
        self._tell(f"no SkyPilot API server at {health.url}: starting one (usually 7 to 15 s)", trouble=False)
        try:
            self._start()
        except Exception as error:
            self._failed_at = self._clock()
            words = " ".join(str(error).split())
            raise ServerTrouble(
                f"a SkyPilot API server could not be started at {health.url}: {words} (try `sky api start` by"
                f" hand); {_MEANWHILE}"
            ) from error
        return True

    def _tell(self, says: str, *, trouble: bool) -> None:
        if says != self.says:
            log.log(logging.ERROR if trouble else logging.INFO, "%s", says)
        self.says, self.trouble = says, trouble


def _judge(health: Health) -> None:
    """Raises ServerTrouble unless SDK and server fit."""
    where = f"the SkyPilot API server {health.url}"
    if health.status == "unhealthy":
        named = f"{sdk.ENDPOINT} or ~/.sky/config.yaml names it"
        hint = "start it with `sky api start`" if health.local else named
        raise ServerTrouble(f"{where} does not answer ({hint}): {_MEANWHILE}")
    if health.status == "needs_auth":
        raise ServerTrouble(f"{where} asks for a login: run `sky api login -e {health.url}`; {_MEANWHILE}")
    if health.status == "version_mismatch" or health.theirs != health.ours:
        theirs = health.theirs or "another version"
        restart = "`sky api stop && sky api start`" if health.local else "its administrator"
        raise ServerTrouble(
            f"{where} is {theirs} and the gateway has skypilot {health.ours}: they must be the same. Install"
            f" skypilot=={health.theirs or 'ITS VERSION'} for the gateway and start it again, or bring the"
            f" server to {health.ours} ({restart}); {_MEANWHILE}",
            answers=health.status == "healthy",
        )
