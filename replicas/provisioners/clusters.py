"""What the provisioner asks of SkyPilot about one cluster, and how it brings one down."""
from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from replicas.provisioners.sdk import Sky

_ACTIVE = ("PENDING", "WAITING", "RUNNING")   # sky.server.requests.requests.RequestStatus, unfinished


def launches(sky: Sky, replica_id: str) -> list[str]:
    """Launch requests for the cluster that the API server has not finished."""
    return [
        request.request_id
        for request in sky.api_status(cluster_name=replica_id)
        if request.cluster_name == replica_id
        and request.status in _ACTIVE
        and request.name.endswith("launch")
    ]


def listed(sky: Sky, replica_id: str) -> list[Any]:
    """The one cluster of that name, or nothing, as the API server remembers it."""
    found: list[Any] = sky.get(sky.status([replica_id], refresh=sky.StatusRefreshMode.NONE))
    return found


def was_up(cluster: Any) -> bool:
    """Whether its machines were ever all there; what follows at once is the submission of `run`."""
    return cluster.status.value != "INIT" or bool(cluster.cluster_ever_up)


def down(sky: Sky, replica_id: str) -> bool:
    """One round of cancel and down; whether the cluster is gone."""
    under_way = launches(sky, replica_id)
    if under_way:
        sky.get(sky.api_cancel(under_way, silent=True))
    # Down also when it is not listed: a launch that was just cancelled may have got as far as a machine.
    with contextlib.suppress(sky.exceptions.ClusterDoesNotExist):
        sky.get(sky.down(replica_id))
    return not launches(sky, replica_id) and not listed(sky, replica_id)


def placed(cluster: Any) -> tuple[str, bool | None]:
    """Where it is (`aws/us-east-1/us-east-1a`), and whether on a spot machine: as SkyPilot has chosen."""
    try:
        resources = cluster.handle.launched_resources
        return str(resources.infra.to_str() or ""), bool(resources.use_spot)
    except Exception:   # no handle yet
        return "", None


def hourly_cost(cluster: Any) -> float | None:
    """Dollars per hour of all nodes, by SkyPilot's catalogue (not the real spot bill; 0 on Kubernetes)."""
    try:
        handle = cluster.handle
        return float(handle.launched_resources.get_cost(3600)) * int(handle.launched_nodes)
    except Exception:   # no handle yet, no instance type, not in the catalogue: asserts and assorted errors
        return None
