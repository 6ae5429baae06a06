"""One attempt to launch a cluster: what is asked of the cloud beside the task, and for how long it may take.

Ports, labels and the dead-man's timer are asked for first. Where they are refused, and nothing else is wrong,
the same is asked without them.
"""
from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replicas.provisioners import keeping
from replicas.provisioners.deadman import wait_for_nothing
from replicas.provisioners.sky_errors import cannot_open_ports, reason

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5   # between two looks at the clock while a launch is under way
_LABEL_MOST = 63      # characters; GCP and Kubernetes


@dataclass(frozen=True, slots=True)
class Extras:
    """What is asked for beside the task. `timer`: minutes; None: no dead-man's timer."""

    ports: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)
    timer: int | None = None

    def without_refused(self, exceptions: Any, error: Exception) -> Extras | None:
        """What to ask for after `error`; None when it is about something else."""
        if self.ports and cannot_open_ports(exceptions, error):
            return replace(self, ports=False)
        if self.labels and refuses_labels(error):
            return replace(self, labels={})
        if self.timer is not None and cannot_end_itself(exceptions, error):
            return replace(self, timer=None)
        return None


def labels(replica_id: str, service: str, owner: str) -> dict[str, str]:
    """Whose machine it is, for a bill or a console: lower case, which every cloud takes that has labels."""
    said = {"skygate-owner": owner, "skygate-service": service, "skygate-replica": replica_id}
    return {name: label(value) for name, value in said.items()}


def label(text: str) -> str:
    """A legal label value: `[a-z0-9-]{1,63}`, and no hyphen at its ends. The end of a long text is kept."""
    legal = re.sub(r"[^a-z0-9-]+", "-", text.lower())
    return legal[-_LABEL_MOST:].strip("-") or "x"


def refuses_labels(error: Exception) -> bool:
    """sky/resources.py: _try_validate_labels; by any enabled cloud when the task pins none."""
    return isinstance(error, ValueError) and "labels are invalid" in str(error)


def cannot_end_itself(exceptions: Any, error: Exception) -> bool:
    """Whether each place that was tried has no autodown (NotSupportedError by sky/clouds/cloud.py)."""
    tried = getattr(error, "failover_history", None) or [error]
    unsupported = exceptions.NotSupportedError
    return all(isinstance(one, unsupported) and "autodown" in str(one).lower() for one in tried)


def submit(sky: Sky, replica_id: str, task: Callable[[Extras], Any], extras: Extras) -> tuple[str, Extras]:
    """Ask for one round over all candidates of the task: the id of the request, and what was asked for."""
    while True:
        try:
            request = sky.launch(
                task(extras),
                cluster_name=replica_id,
                retry_until_up=False,
                idle_minutes_to_autostop=extras.timer,
                wait_for=None if extras.timer is None else wait_for_nothing(sky),
                down=extras.timer is not None,
            )
        except Exception as error:
            less = extras.without_refused(sky.exceptions, error)
            if less is None:
                raise
            log.info("%s: %s; asked again without", replica_id, reason(error))
            extras = less
        else:
            return request, extras


def follow(sky: Sky, request: str, replica_id: str, directory: Path, late: Callable[[], bool]) -> None:
    """Wait for a launch, writing what SkyPilot says into the replica's logs.

    Raises what the launch raises, and TimeoutError once it is late: the request goes on then, and so does the
    thread that waits for it, which nothing can wake when the server has stopped to answer.
    """
    ended = threading.Event()
    errors: list[BaseException] = []

    def stream() -> None:
        try:
            with keeping.appending(directory) as out:
                sky.stream_and_get(request, output_stream=out)
        except BaseException as error:
            errors.append(error)
        finally:
            ended.set()
            provision.stop()

    provision = keeping.ProvisionLog(sky, replica_id, directory)
    provision.start()
    threading.Thread(target=stream, name="skypilot launch", daemon=True).start()
    while not ended.wait(WATCH_SECONDS):
        if late():
            raise TimeoutError
    if errors:
        raise errors[0]
