"""What `gateway selftest` may cost, whether it may begin, and with which flags its gateway is started."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from gateway import settings as options
from gateway.flags import SETTINGS
from gateway.settings import Settings, SettingsError

if TYPE_CHECKING:
    from replicas.spec import Service

# Beside two cold starts and the idle time: two answers, a lost machine noticed, machines ended.
SPARE_SECONDS: Final = 600.0
IDLE_SECONDS: Final = 20.0  # --idle-timeout, when nothing is said

TAKEN: Final = (
    *("plan", "gpus", "num_nodes", "use_spot", "infra", "env", "secret", "env_file", "max_hourly_cost"),
    *("price", "provisioner", "replica_transport", "provision_timeout", "idle_timeout", "probe_interval"),
    *("model", "log_level"),
)
"""Settings of `up` that `selftest` takes too."""


def prepare(file: str, values: Mapping[str, Any]) -> tuple[Settings, Service, Quote]:
    """What the flags ask for, and what it may cost. Raises SettingsError and SpecError."""
    from gateway import launching, preflight, transport
    from replicas import plans, spec

    settings = options.make(file, **values)
    settings = replace(settings, provisioner=options.guess_provisioner(settings))
    if settings.idle_timeout is None:
        settings = replace(settings, idle_timeout=IDLE_SECONDS)
    if settings.provisioner == "static":
        raise SettingsError("selftest starts and ends replicas, and static ones are not the gateway's to end")
    known = launching.variables(settings, os.environ, launching.NO_VARIABLES)
    service = spec.load(settings.yaml, model=settings.model, environ={**os.environ, **known.all()})
    transport.check(settings, service)
    if settings.provisioner == "local":
        own = {"price": launching.replica_price(settings) or 0.0, "refused": False}  # this machine is here
        return settings, service, quote(service, settings, (own,))
    menu = plans.menu(service, launching.options(settings, known))
    offers = preflight.offers(menu, preflight.Machine.this())
    return settings, service, quote(service, settings, offers)


@dataclass(frozen=True, slots=True)
class Quote:
    """What a run may cost. `hourly`: dollars per hour of the dearest plan, None = not known; `seconds`: how
    long a machine is rented at most, if all goes well."""

    hourly: float | None
    seconds: float
    unpriced: tuple[str, ...] = ()  # kinds of machines whose price is not known

    def __str__(self) -> str:
        from gateway.display import duration

        return (
            f"at most {duration(self.seconds)} at ${self.hourly or 0:.2f} an hour, ${self.dollars or 0:.2f}"
        )

    @property
    def dollars(self) -> float | None:
        return None if self.hourly is None else self.hourly * self.seconds / 3600


def quote(service: Service, settings: Settings, plans: Sequence[Mapping[str, Any]]) -> Quote:
    """`plans`: as `gateway check` shows them."""
    idle = settings.idle_timeout or 0.0
    seconds = 2 * service.probe.initial_delay_seconds + idle + SPARE_SECONDS
    open_plans = [plan for plan in plans if not plan["refused"]]
    if not open_plans:
        raise SettingsError("every plan is over --max-hourly-cost: raise it, or give a cheaper --plan")
    if any(plan["price"] is None for plan in open_plans):
        kinds = {kind for plan in open_plans for kind in plan["unpriced"]}
        return Quote(None, seconds, tuple(sorted(kinds)))
    return Quote(max(plan["price"] for plan in open_plans), seconds)


def refusal(found: Quote, max_cost: float) -> str | None:
    """Why it must not begin; None when it may."""
    from gateway import launching
    from gateway.display import duration

    if found.hourly is None or found.dollars is None:
        each = launching.price_flags(found.unpriced)
        one = f" or {each} (of one node)" if each else ""
        return (
            "the price is not known, so --max-cost could not be kept:"
            f" give --price DOLLARS (of a replica, an hour){one}"
        )
    if found.dollars > max_cost:
        enough = math.ceil(found.dollars * 100) / 100
        return (
            f"{duration(found.seconds)} at ${found.hourly:.2f} an hour (two cold starts as long as the YAML"
            f" allows) may cost ${found.dollars:.2f}, more than --max-cost {max_cost:g}: give"
            f" --max-cost {enough:g}, a cheaper --plan, or a shorter initial_delay_seconds"
        )
    return None


def environment(settings: Settings, max_cost: float) -> dict[str, str]:
    """The flags as variables, which others on this machine cannot read as they can a command line."""
    fixed = {
        "port": 0, "admin_port": 0, "min_replicas": 0, "max_replicas": 1, "max_daily_cost": max_cost,
    }  # fmt: skip
    found = {}
    for row in SETTINGS:
        value = fixed.get(row.name, getattr(settings, row.name))
        given = row.name in fixed or row.name in TAKEN
        if given and value is not None and value != ():
            found[row.env] = "\n".join(value) if isinstance(value, tuple) else str(value)
    return found
