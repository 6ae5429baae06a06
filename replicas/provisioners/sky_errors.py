"""SkyPilot's exceptions (0.14.1, sky/exceptions.py) as LaunchError, with SkyPilot's own reason."""
from __future__ import annotations

import re
from typing import Any, Final

from replicas.provisioners import Infeasible, LaunchError, NoCapacity, SetUpFailed

_PERMANENT: Final = (   # a person must mend something
    "NoCloudAccessError",   # `Cloud access is not set up. Run: sky check`, also under retry_until_up
    "InvalidClusterNameError",
    "InvalidSkyPilotConfigError",
    "ClusterOwnerIdentityMismatchError",
    "CloudUserIdentityError",
    "CloudError",
    "InvalidCloudConfigs",
    "InvalidCloudCredentials",
    "PermissionDeniedError",
    "UserRequestRejectedByPolicy",
)
_AWAY: Final = (   # the API server, or our way to it: asked again, and nothing is concluded about replicas
    "ApiServerConnectionError",
    "ApiServerAuthenticationError",
    "APIVersionMismatchError",
    "ServerTemporarilyUnavailableError",
    "RequestInterruptedError",   # it restarts, and will not go on with the launch
    "ClientError",
)
# SkyPilot's server calls any error that is neither Python's nor its own a CloudError (sky/exceptions.py:
# wrap_exception): of these packages, or with these words, it says nothing of what we asked for.
_PLUMBING: Final = re.compile(
    r"aiohttp|anyio|asyncpg|concurrent|filelock|grpc|http|httpx|psycopg2|requests|socket|sqlalchemy|sqlite3|ssl"
    r"|urllib3|websockets"
)
_PASSING: Final = re.compile(
    r"Connect|Timeout|Timed ?out|Endpoint\w*Error|Unavailable|Throttl|RequestLimitExceeded|TooManyRequests"
    r"|Rate ?limit|RATE_LIMIT|InternalServerError|IncompleteRead",
    re.IGNORECASE,
)
_NO_SUCH_REQUEST: Final = "Failed to get request "   # a RuntimeError, sky/client/sdk.py: ids die with it
_NEVER: Final = ("NotSupportedError", "ProvisionUnsupportedError")   # spot, several nodes, on a cloud without
_SET_UP: Final = ("CommandError", "ClusterSetUpError")
_NO_QUOTA: Final = "Found no quota for "   # sky/backends/cloud_vm_ray_backend.py; words, for it has no class
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST = 500   # characters; a failover table of every zone can be pages


def reason(error: BaseException) -> str:
    """What SkyPilot said, as one line of bounded length, or the kind of error where it said nothing."""
    words = " ".join(_ANSI.sub("", str(error)).split())
    return (words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…") or type(error).__name__


def launch_error(exceptions: Any, error: Exception) -> LaunchError:
    """`exceptions` is sky.exceptions. What is not known to be permanent may be tried again."""
    if isinstance(error, exceptions.ResourcesUnavailableError):
        return _unavailable(exceptions, error)
    if isinstance(error, _classes(exceptions, _NEVER)):
        return Infeasible(reason(error))
    if isinstance(error, _classes(exceptions, _SET_UP)):
        return SetUpFailed(reason(error))
    return LaunchError(reason(error), permanent=_permanent(exceptions, error))


def _unavailable(exceptions: Any, error: Any) -> LaunchError:
    """With a failover history places were tried and had none free: try again later. Without, or when each
    place said that we may have none there, nothing can ever fit."""
    tried: list[Exception] = error.failover_history
    if not tried:
        unsure = error.no_failover or isinstance(error, exceptions.KubeAPIUnreachableError)
        return NoCapacity(reason(error)) if unsure else Infeasible(reason(error))
    said = f"{reason(error)} (last: {reason(tried[-1])})"
    hopeless = _classes(exceptions, _NEVER)
    never = (isinstance(e, hopeless) or _NO_QUOTA in str(e) or _permanent(exceptions, e) for e in tried)
    return Infeasible(said) if all(never) else NoCapacity(said)


def _passing(exceptions: Any, error: Exception) -> bool:
    """Whether it is a CloudError about the network, a rate limit or SkyPilot's own database."""
    if not isinstance(error, exceptions.CloudError):
        return False
    return bool(_PLUMBING.fullmatch(error.cloud_provider) or _PASSING.search(str(error)))


def _permanent(exceptions: Any, error: Exception) -> bool:
    if _passing(exceptions, error):
        return False
    if isinstance(error, _classes(exceptions, _PERMANENT)):
        return True
    # Of Python's own or SkyPilot's: `requests` calls an answer that is no JSON a ValueError too.
    says = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] in ("builtins", "sky")
    # From a race with somebody's `down`.
    return says and not isinstance(error, exceptions.ClusterDoesNotExist)


def is_away(exceptions: Any, error: Exception) -> bool:
    """Whether it is the API server that failed, or the way to it: it says nothing about any cluster."""
    outside = type(error).__module__.partition(".")[0] in ("requests", "urllib3", "http")
    return (
        outside
        or isinstance(error, (*_classes(exceptions, _AWAY), OSError))
        or (isinstance(error, RuntimeError) and str(error).startswith(_NO_SUCH_REQUEST))
    )


def is_unreachable(exceptions: Any, error: Exception) -> bool:
    """Whether a machine could not be asked; False: it was, or there is nothing to ask, as SkyPilot never came
    so far (backend_utils.py: check_cluster_available; after a crash of its server it may call that UP)."""
    if isinstance(error, exceptions.ClusterNotUpError) and "not properly set up" in str(error):
        return False
    return not isinstance(error, exceptions.CommandError) or error.returncode == 255   # 255: ssh's own


def is_other_hardware(exceptions: Any, error: Exception) -> bool:
    """Whether our name is taken by a cluster that the launch cannot go on with: it must be ended first."""
    return isinstance(error, exceptions.ResourcesMismatchError)


def _classes(exceptions: Any, names: tuple[str, ...]) -> tuple[type[Exception], ...]:
    return tuple(getattr(exceptions, name) for name in names)


def cannot_open_ports(exceptions: Any, error: Exception) -> bool:
    """Whether the task was refused because it names `resources.ports`, and nothing else is wrong with it.

    Two shapes (sky/resources.py: _try_validate_ports): the YAML pins the cloud, or no enabled cloud can.
    """
    return (isinstance(error, exceptions.NotSupportedError) and "open_ports" in str(error)) or (
        isinstance(error, ValueError) and "No enabled clouds support opening ports" in str(error)
    )
