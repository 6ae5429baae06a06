"""Every way a request can go wrong, named by what the caller may do next.

::

    GatewayError              an answer the gateway makes itself: status, code, Retry-After, typed end
    ├── Rejected              one of our own checks said no, before a lease                end=rejected
    │   ├── BadRequest              400: mend the request
    │   ├── Unauthorized            401: send an API key of this gateway
    │   ├── UnknownPath             404 / 405: not one of the paths served here
    │   ├── ModelNotFound           404: `GET /v1/models` lists what there is
    │   ├── BodyTooLarge            413
    │   ├── UnsupportedEncoding     415: send the body uncompressed, as application/json
    │   ├── WaitingRoomFull         429: come back in 30 s
    │   ├── ServicePaused           503: `gateway scale --max 0`, or going down
    │   ├── LaunchBlocked           503: the last start failed; the cause is in the message
    │   └── NotHeld                 503: the client asked not to be held (`X-Gateway-Hold: reject`)
    ├── ColdStartFailed       503: the wait ended without a replica                end=cold_start_failed
    ├── HoldTimeout           503: waited as long as was allowed                           end=timeout
    ├── Shutdown              503: this gateway is stopping; retry reaches the next       end=shutdown
    ├── InternalError         500: a fault of the gateway's own, logged             end=upstream_error
    └── UpstreamError         the replica failed or refused                         end=upstream_error
        ├── Undialable              nothing was sent: any replica may be tried       end=upstream_died
        ├── NotTaken                503 / queue full, nothing ran: another may be   end=upstream_error
        ├── DiedSilent              closed before the first byte: another may be     end=upstream_died
        ├── DiedMidway              closed after the first byte: never again         end=upstream_died
        ├── BadResponse             not HTTP: never again                            end=upstream_died
        ├── UpstreamTimeout         504, silent too long: never again                      end=timeout
        └── Refused                 the replica answered >= 400; its status and reason

`Retry-After` is always within 1..60 s: openai-python stops retrying above 120 s, older ones above 60 s, and
openai-node sleeps for whatever it is told (measured with openai-python 1.109, 2.54, 3.54, openai-node 6.49).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class End(StrEnum):
    """How a request ended; every request has exactly one (the `end` label of `gateway_requests_total`)."""

    COMPLETE = "complete"
    CLIENT_GONE = "client_gone"
    CLIENT_SLOW = "client_slow"
    UPSTREAM_ERROR = "upstream_error"
    UPSTREAM_DIED = "upstream_died"
    TIMEOUT = "timeout"
    COLD_START_FAILED = "cold_start_failed"
    REJECTED = "rejected"
    SHUTDOWN = "shutdown"
    WORKER_DIED = "worker_died"


class GatewayError(Exception):
    """An answer the gateway makes itself. `message` is for a person and says what to do next."""

    status = 500
    type = "server_error"
    code: str = "internal_error"
    end = End.UPSTREAM_ERROR
    retry_after: int | None = None  # seconds, 1..60

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        status: int | None = None,
        type: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        if code is not None:
            self.code = code
        if status is not None:
            self.status = status
        if type is not None:
            self.type = type
        if retry_after is not None:
            self.retry_after = min(60, max(1, retry_after))


class Rejected(GatewayError):
    """One of our own checks said no before a replica was chosen: no replica saw the request."""

    end = End.REJECTED
    type = "invalid_request_error"


class BadRequest(Rejected):
    """The request can never succeed as it is."""

    status = 400
    code = "invalid_request"


class Unauthorized(Rejected):
    """No API key, or not one of this gateway's."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"


class UnknownPath(Rejected):
    """Not on the allow-list; no path of a replica is reachable that is not."""

    status = 404
    code = "unknown_url"


class ModelNotFound(Rejected):
    """Several services, and none has this name."""

    status = 404
    code = "model_not_found"


class BodyTooLarge(Rejected):
    """Over `--max-body`."""

    status = 413
    code = "body_too_large"


class UnsupportedEncoding(Rejected):
    """A request `Content-Encoding` other than identity."""

    status = 415
    code = "unsupported_content_encoding"


class WaitingRoomFull(Rejected):
    """`--max-waiting` or `--max-waiting-bytes` is reached over all workers."""

    status = 429
    type = "rate_limit_error"
    code = "cold_queue_full"
    retry_after = 30


class ServicePaused(Rejected):
    """A person set the service's maximum to 0, or it is being taken down."""

    status = 503
    type = "server_error"
    code = "service_paused"
    retry_after = 60


class LaunchBlocked(Rejected):
    """The launch breaker is open: the cause of the last failed start is in the message."""

    status = 503
    type = "server_error"
    code = "launch_blocked"
    retry_after = 60


class NotHeld(Rejected):
    """`X-Gateway-Hold: reject`: the cold start runs on, the client comes back by itself."""

    status = 503
    type = "server_error"
    code = "cold_start"
    retry_after = 30


class ColdStartFailed(GatewayError):
    """The cold start this request waited for failed."""

    status = 503
    code = "cold_start_failed"
    end = End.COLD_START_FAILED
    retry_after = 60


class HoldTimeout(GatewayError):
    """Held for as long as `--hold-max` or the client's patience allows."""

    status = 503
    code = "cold_start_timeout"
    end = End.TIMEOUT
    retry_after = 1


class Shutdown(GatewayError):
    """This gateway is stopping."""

    status = 503
    code = "gateway_stopping"
    end = End.SHUTDOWN
    retry_after = 2


class InternalError(GatewayError):
    """A fault of the gateway's own; the traceback is in the log."""


class UpstreamError(GatewayError):
    """The replica failed or refused. `cause` is the label of `gateway_retries_total`."""

    status = 502
    code = "upstream_error"
    cause = "upstream_error"


class Undialable(UpstreamError):
    """Dial refused, reset or timed out: nothing was sent. `lasting`: waiting will not mend it."""

    lasting = False

    end = End.UPSTREAM_DIED
    code = "replica_unreachable"
    cause = "dial"
    retry_after = 5


class NotTaken(UpstreamError):
    """503, or SGLang's queue-full event in a 200 stream: the replica did not run it."""

    status = 503
    code = "replica_queue_full"
    cause = "queue_full"
    retry_after = 5


class DiedSilent(UpstreamError):
    """The request was sent and the connection closed before one byte of a response."""

    end = End.UPSTREAM_DIED
    code = "replica_died"
    cause = "died_silent"
    retry_after = 5


class DiedMidway(UpstreamError):
    """The response broke off after its first byte."""

    end = End.UPSTREAM_DIED
    code = "replica_died"
    cause = "died_midway"
    retry_after = 5


class BadResponse(UpstreamError):
    """What the replica sent is not HTTP, or passes our bounds."""

    end = End.UPSTREAM_DIED
    code = "replica_bad_response"
    cause = "bad_response"


class UpstreamTimeout(UpstreamError):
    """The replica was silent for `--upstream-timeout`."""

    status = 504
    end = End.TIMEOUT
    code = "replica_timeout"
    cause = "timeout"


class Refused(UpstreamError):
    """The replica itself answered >= 400 (or its first event was an error)."""

    code = "replica_refused"
