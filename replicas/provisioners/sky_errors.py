"""SkyPilot's exceptions (0.14.1, sky/exceptions.py) as LaunchError, with SkyPilot's own reason."""
from __future__ import annotations

import re
from typing import Any

from replicas.provisioners import Infeasible, LaunchError, NoCapacity

_PERMANENT = (
    "NoCloudAccessError",   # `Cloud access is not set up. Run: sky check`, also under retry_until_up
    "InvalidClusterNameError",
    "InvalidSkyPilotConfigError",
    "ClusterOwnerIdentityMismatchError",
    "CloudUserIdentityError",
    "CloudError",
    "ApiServerAuthenticationError",
    "APIVersionMismatchError",
)
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST = 500   # characters; a failover table of every zone can be pages


def reason(error: BaseException) -> str:
    """What SkyPilot said, as one line of bounded length, or the kind of error where it said nothing."""
    words = " ".join(_ANSI.sub("", str(error)).split())
    return (words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…") or type(error).__name__


def launch_error(exceptions: Any, error: Exception) -> LaunchError:
    """`exceptions` is sky.exceptions.

    ResourcesUnavailableError means two things: with a failover history, places were tried and had none free
    (try again later); without, nothing can ever fit. What is not known to be permanent may be tried
    again: the API server being away or restarting, a setup that failed over ssh.
    """
    if isinstance(error, exceptions.ResourcesUnavailableError):
        if error.failover_history:
            tried = f"{reason(error)} (last: {reason(error.failover_history[-1])})"
            return NoCapacity(tried)
        return Infeasible(reason(error))
    if isinstance(error, exceptions.NotSupportedError):   # spot or several nodes, on a cloud that has none
        return Infeasible(reason(error))
    known = tuple(getattr(exceptions, name) for name in _PERMANENT)
    permanent = isinstance(error, (*known, ValueError)) and not isinstance(
        error, exceptions.ClusterDoesNotExist   # a ValueError, from a race with somebody's `down`
    )
    return LaunchError(reason(error), permanent=permanent)


def cannot_open_ports(exceptions: Any, error: Exception) -> bool:
    """Whether the task was refused because it names `resources.ports`, and nothing else is wrong with it.

    Two shapes (sky/resources.py: _try_validate_ports): the YAML pins the cloud, or no enabled cloud can.
    """
    return (isinstance(error, exceptions.NotSupportedError) and "open_ports" in str(error)) or (
        isinstance(error, ValueError) and "No enabled clouds support opening ports" in str(error)
    )
