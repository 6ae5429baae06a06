"""What a new controller finds in the table: its services' replicas, limits, failures and past cold starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from replicas import breaker, spec
from replicas.board import Board
from replicas.fleet import Fleet
from replicas.journal import Observer
from replicas.lifecycle import Replica
from replicas.policy import ControllerConfig, Override
from replicas.spec import Service
from replicas.table import Table

log = logging.getLogger(__name__)


def adopt(
    services: Sequence[Service],
    table: Table,
    *,
    board: Board,
    config: ControllerConfig,
    observer: Observer,
    now: float,
) -> dict[str, Fleet]:
    """A fleet per service, in the order of the board's rows; then one for each service that is not served any
    more but still has replicas, which will wind them down."""
    rows: dict[str, list[Replica]] = {}
    for r in table.replicas():
        rows.setdefault(r.service, []).append(r)
    served = {s.name for s in services}
    retired = [as_it_was(found[0], services[0]) for name, found in rows.items() if name not in served]
    fleets: dict[str, Fleet] = {}
    for index, service in enumerate([*services, *retired]):
        name = service.name
        limits = table.limits(name)
        if limits is not None and limits.spec_hash != service.hash:
            table.clear_limits(name)  # made for another YAML
            limits = None
        past = table.cold_starts(name, service.hash) or table.cold_starts(name)
        fleets[name] = Fleet(
            service,
            index,
            config=config,
            board=board,
            observer=observer,
            rows=rows.get(name, ()),
            breaker=breaker.from_json(table.breaker(name), service.hash),
            override=None if limits is None else Override(limits.min, limits.max),
            history=[(p.phase, p.seconds) for p in past],
            now=now,
            retired=name not in served,
        )
    return fleets


def as_it_was(r: Replica, now: Service) -> Service:
    """The service from the YAML that the replica was decided upon, or as it is now if that cannot be read."""
    try:
        return spec.parse(r.spec_text, r.service, name=r.service, environ=os.environ)
    except spec.SpecError as error:
        log.warning("%s comes from a YAML that cannot be read any more: %s", r.id, error)
        return replace(now, name=r.service)
