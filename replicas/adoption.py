"""What a new controller finds in the table: its services' replicas, limits, failures and past cold starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from replicas import breaker, budget, spec
from replicas.board import Board
from replicas.fleet import Fleet
from replicas.journal import Observer
from replicas.lifecycle import Replica, State
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
    past: dict[str, list[Replica]] = {}
    for r in table.replicas(gone=True):
        if r.state is not State.GONE:
            rows.setdefault(r.service, []).append(r)
        elif r.since > now - budget.DAY:
            past.setdefault(r.service, []).append(r)
    served = {s.name for s in services}
    known = config.launch.variables
    retired = [as_it_was(found[0], services[0], known) for name, found in rows.items() if name not in served]
    fleets: dict[str, Fleet] = {}
    for index, service in enumerate([*services, *retired]):
        name = service.name
        limits = table.limits(name)
        if limits is not None and limits.spec_hash != service.hash:
            table.clear_limits(name)  # made for another YAML
            limits = None
        times = table.cold_starts(name, service.hash) or table.cold_starts(name)
        fleets[name] = Fleet(
            service,
            index,
            config=config,
            board=board,
            observer=observer,
            rows=rows.get(name, ()),
            breaker=breaker.from_json(table.breaker(name), service.hash),
            override=None if limits is None else Override(limits.min, limits.max),
            history=[(time.phase, time.seconds, time.plan) for time in times],
            now=now,
            past=past.get(name, ()),
            retired=name not in served,
        )
    return fleets


def as_it_was(r: Replica, now: Service, variables: Mapping[str, str] | None = None) -> Service:
    """The service from the YAML that the replica was decided upon, or as it is now if that cannot be read.

    `variables` give values to names that the YAML lists without one, as the environment does.
    """
    try:
        return spec.parse(r.spec_text, r.service, name=r.service, environ={**os.environ, **(variables or {})})
    except spec.SpecError as error:
        log.warning("%s comes from a YAML that cannot be read any more: %s", r.id, error)
        return replace(now, name=r.service)
