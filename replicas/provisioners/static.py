"""Replicas that somebody else runs: a list of URLs (`--replica URL`), each lent to one id at a time.

Nothing is started or ended; launching assigns a URL, terminating gives it back. Who has which is kept in
`<state>/static-<owner>.json`, so that the next gateway adopts them.
"""
from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from replicas.plans import Plan
from replicas.provisioners import YAML_DECIDES, Instance, LaunchError, NoCapacity, Other, owned_by
from replicas.provisioners.launcher import write_atomically

if TYPE_CHECKING:
    from replicas.spec import Service


class StaticProvisioner:
    """Provisioner of URLs. `price`: dollars per hour to show for each. Raises ValueError (see base_url)."""

    def __init__(
        self, urls: Sequence[str], state_dir: Path, owner: str, *, price: float | None = None
    ) -> None:
        self._urls = tuple(dict.fromkeys(base_url(url) for url in urls))
        self._file = Path(state_dir).resolve() / f"static-{owner}.json"
        self._owner = owner
        self._price = price
        # Mutable, by the three verbs; each leaves memory and file alike before its first await.
        self._assigned: dict[str, str] = {}
        self._last_freed: list[str] = []   # a server that has just failed is the last to be tried again
        self._terminated: set[str] = set()
        if self._file.exists():
            kept = json.loads(self._file.read_bytes())
            self._assigned, self._last_freed = kept["assigned"], kept["last_freed"]

    def __repr__(self) -> str:
        return f"<StaticProvisioner {len(self._assigned)} of {len(self._urls)} URLs assigned>"

    async def launch(
        self, replica_id: str, service: Service, env: Mapping[str, str], plan: Plan = YAML_DECIDES
    ) -> None:
        """See Provisioner. Nothing but the id is used: the server runs already, with what it has."""
        if not owned_by(replica_id, self._owner):
            raise LaunchError(f"{replica_id} is not a name of this gateway (owner {self._owner})")
        if replica_id in self._terminated:
            raise LaunchError(f"{replica_id} was terminated before it was launched", permanent=False)
        if replica_id in self._assigned:
            return
        free = [url for url in self._urls if url not in self._assigned.values()]
        if not free:
            raise NoCapacity(f"all {len(self._urls)} servers given with --replica are in use")
        self._assigned[replica_id] = min(free, key=self._freed)
        self._save()

    def _freed(self, url: str) -> int:
        return self._last_freed.index(url) if url in self._last_freed else -1

    async def terminate(self, replica_id: str) -> None:
        """See Provisioner. The server is not touched: it is gone from *us*."""
        if not owned_by(replica_id, self._owner):
            return
        self._terminated.add(replica_id)
        url = self._assigned.pop(replica_id, None)
        if url is not None:
            self._last_freed = [freed for freed in self._last_freed if freed != url] + [url]
            self._save()

    async def instances(self, fresh: Collection[str] = ()) -> dict[str, Instance]:
        """See Provisioner. A URL that is no longer on the command line is dead."""
        return {
            replica_id: Instance(replica_id, alive=True, url=url, hourly_cost=self._price)
            if url in self._urls
            else Instance(replica_id, alive=False, detail=f"{url} is no longer given with --replica")
            for replica_id, url in self._assigned.items()
            if owned_by(replica_id, self._owner)
        }

    async def others(self, services: Collection[str]) -> list[Other]:
        """See Provisioner. All servers are somebody else's; there is nothing to tell."""
        return []

    async def close(self) -> None:
        """See Provisioner."""

    def _save(self) -> None:
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(str(self._file), {"assigned": self._assigned, "last_freed": self._last_freed})


def base_url(text: str) -> str:
    """`host:port`, or an http(s) URL with or without a path; without trailing slash. Raises ValueError."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:   # a port that is no number
        valid = False
    if not valid or parts.query or parts.fragment or parts.username:
        raise ValueError(f"{text!r} is not the URL of a server, such as http://10.0.0.5:30000")
    return url.rstrip("/")
