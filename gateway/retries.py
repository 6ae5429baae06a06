"""Whether a failed attempt is followed by another, and what it says of the replica."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.errors import NotTaken, Refused, Undialable, UpstreamError
from gateway.patience import check_limit
from gateway.upstreams import Upstream, Upstreams

if TYPE_CHECKING:
    from gateway.proxy import Exchange

MAX_ATTEMPTS = 3


def may_try_again(exchange: Exchange, error: UpstreamError, avoid: list[str]) -> bool:
    """Nothing ran, or nothing was answered (`error` says which): whether to try elsewhere. `avoid` is given
    the upstream that failed, unless it was not even reached. Raises HoldTimeout."""
    upstreams, upstream = exchange.upstreams, exchange.upstream
    assert upstreams is not None
    assert upstream is not None
    if isinstance(error, Undialable):
        # Nothing was sent: no attempt. It waits for whoever can be dialled, as long as any hold may.
        hopeless = error.lasting or exchange.patience.mode == "reject"
        if hopeless and not upstreams.has_other_than(()):
            return False
        exchange.attempts -= 1
        check_limit(exchange, upstreams)
        return True
    avoid.append(upstream.id)
    return exchange.attempts < MAX_ATTEMPTS and upstreams.has_other_than(avoid)


def judge(upstreams: Upstreams, upstream: Upstream, error: Exception | None) -> None:
    """An attempt has ended so: a failure counts against the replica only where it is its fault, which a 4xx
    and "queue full" never are."""
    if error is None:
        upstreams.succeeded(upstream)
    elif isinstance(error, Refused) and error.status < 500:
        return
    elif isinstance(error, UpstreamError) and not isinstance(error, NotTaken):
        upstreams.failed(upstream, error.message, unreachable=isinstance(error, Undialable))
