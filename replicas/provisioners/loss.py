"""Takes a replica away behind the gateway's back, as a preemption does: for `gateway selftest`."""
from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from replicas.provisioners import folder, owned_by, processes
from replicas.provisioners.sdk import import_sky


def take_away(provisioner: str, state_dir: Path, owner: str, replica_id: str) -> None:
    """`sky down` by name, or SIGKILL to every process of a local replica; returns when that is done.

    Blocks, for a cloud a minute or more. Raises ValueError for a name that is not `owner`'s, LookupError when
    there is nothing to take away, and whatever SkyPilot raises.
    """
    if not owned_by(replica_id, owner):
        raise ValueError(f"{replica_id} is not a name of this gateway (owner {owner})")
    if provisioner == "skypilot":
        sky = import_sky()
        sky.get(sky.down(replica_id))
        return
    directory = Path(state_dir).resolve() / "replicas" / replica_id
    record = folder.record(directory)
    members = processes.members(record["pid"], record["started"], directory) if record else set()
    if not members:
        raise LookupError(f"{replica_id}: no process of it runs")
    for process in members:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
