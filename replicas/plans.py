"""Launch plans: on which hardware a replica may run, in the order in which it is tried.

PURE. One plan is accelerators per node, number of nodes, spot or on-demand, and where; what it leaves open is
as the YAML says. SkyPilot's `any_of` tries alternatives too, but it cannot vary `num_nodes`, and DeepSeek-R1
needs exactly that: `--plan H200:8x1 --plan H100:8x2 --plan A100-80GB:8x4`.

    menu(service, options)           what the YAML and the flags allow
    choices(menu, ...)               what may be tried now, best first: spot losses and money shorten the list
    following(choices, last)         what comes after a plan that had no capacity; around for ever
    apply(task, plan)                the YAML's task with a plan's hardware

A plan's name (`H200:8x1 spot`) is what a replica's row keeps and what people see; `read` turns it back.
Dollars are per hour; a price is that of one node until it is multiplied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, Protocol

LOSSES: Final = 3  # of spot machines ...
LOSSES_WITHIN: Final = 2 * 3600.0  # ... in so many seconds: spot is not worth it today
ON_DEMAND_FOR: Final = 6 * 3600.0  # s without spot from the last of them on

_ACCELERATORS: Final = re.compile(r"([A-Za-z0-9][-.\w]*)(?::([0-9]+(?:\.[0-9]+)?))?", re.ASCII)
_PLAN: Final = re.compile(r"([A-Za-z0-9][-.\w]*):([0-9]+(?:\.[0-9]+)?)(?:x([1-9][0-9]*))?", re.ASCII)
_WHERE: Final = ("cloud", "region", "zone", "infra")
_MARKETS: Final = {True: "spot", False: "on-demand"}


class PlanError(ValueError):
    """A plan that cannot be read; one line that says how it is written."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one launch asks for. None = as the YAML says. Equal plans are the same hardware on the same
    market."""

    accelerators: str | None = None  # of one node, as SkyPilot writes them: "H200:8"
    num_nodes: int | None = None
    use_spot: bool | None = None
    infra: str | None = None  # "aws/us-east-1", "k8s/context", as `sky launch --infra`
    max_hourly_cost: float | None = field(default=None, compare=False)  # $/h of a node: SkyPilot's filter
    envs: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    chosen: bool = field(default=False, compare=False)  # `use_spot` picks among the YAML's alternatives

    @property
    def name(self) -> str:
        """`H200:8x1 spot infra=aws`; "" when the YAML decides everything."""
        parts = [self.hardware] if self.hardware else []
        if self.use_spot is not None:
            parts.append(_MARKETS[self.use_spot])
        if self.infra is not None:
            parts.append(f"infra={self.infra}")
        return " ".join(parts)

    @property
    def hardware(self) -> str:
        """The part of the name on which a cold start's duration depends."""
        nodes = "" if self.num_nodes is None else f"x{self.num_nodes}"
        return f"{self.accelerators or ''}{nodes}"


def parse(text: str) -> Plan:
    """`H200:8x1`: accelerator, count per node, number of nodes (1 when left out). Raises PlanError."""
    match = _PLAN.fullmatch(text.strip())
    if match is None or not float(match[2]):
        raise PlanError(f"{text!r} is not ACCELERATOR:COUNTxNODES, such as H100:8x2")
    return Plan(f"{match[1]}:{_count(match[2])}", int(match[3] or 1))


def accelerators(text: str) -> str:
    """`H200` or `H200:8` as `NAME:COUNT`. Raises PlanError."""
    match = _ACCELERATORS.fullmatch(text.strip())
    if match is None or not float(match[2] or 1):
        raise PlanError(f"{text!r} is not ACCELERATOR:COUNT, such as H200:8")
    return f"{match[1]}:{_count(match[2] or '1')}"


def read(name: str) -> Plan:
    """The plan with this `name`; of a name that no plan has, what can be understood."""
    plan = Plan()
    for word in name.split():
        if word in _MARKETS.values():
            plan = replace(plan, use_spot=word == "spot")
        elif word.startswith("infra="):
            plan = replace(plan, infra=word.removeprefix("infra="))
        elif match := re.fullmatch(r"([^:]+:[0-9.]+)?(?:x([0-9]+))?", word, re.ASCII):
            plan = replace(plan, accelerators=match[1], num_nodes=int(match[2]) if match[2] else None)
    return plan


def parse_prices(texts: Iterable[str]) -> dict[str, float]:
    """`H200:8=27.5` (one node of that kind) and `2` (a whole replica, under the key ""). Raises PlanError."""
    prices: dict[str, float] = {}
    for text in texts:
        kind, _, amount = text.rpartition("=")
        try:
            dollars = float(amount)
        except ValueError:
            dollars = math.nan
        if not 0 <= dollars < math.inf:
            raise PlanError(f"{text!r} is not DOLLARS or ACCELERATOR:COUNT=DOLLARS, such as H200:8=27.5")
        prices[accelerators(kind) if kind else ""] = dollars
    return prices


# ------------------------------------------------------------ what is allowed


class Market(StrEnum):
    YAML = "yaml"  # as it says; SkyPilot takes the cheapest alternative
    ON_DEMAND = "on-demand"
    SPOT = "spot"
    SPOT_FIRST = "spot, then on-demand"
    MIXED = "as the YAML mixes them"  # SkyPilot takes the cheapest; which it took is known once it has


@dataclass(frozen=True, slots=True)
class Options:
    """What a person says with flags. Nothing said: the YAML alone."""

    plans: tuple[Plan, ...] = ()
    gpus: str | None = None
    num_nodes: int | None = None
    use_spot: bool | None = None
    infra: str | None = None
    prices: Mapping[str, float] = field(default_factory=dict)  # as `parse_prices`
    max_hourly_cost: float | None = None  # dollars per hour of all replicas together
    max_daily_cost: float | None = None  # dollars within 24 hours
    envs: Mapping[str, str] = field(default_factory=dict, repr=False)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    rented: bool = True  # False: replicas run where they run (local, static), whatever a plan says

    @property
    def variables(self) -> dict[str, str]:
        """All names with a value, for a YAML that lists them without one."""
        return {**self.envs, **self.secrets}


@dataclass(frozen=True, slots=True)
class Menu:
    """What one service may be launched on."""

    plans: tuple[Plan, ...] = (Plan(),)  # in the order of preference; the market is left open
    market: Market = Market.YAML
    base_ondemand: int = 0  # so many replicas are never spot
    own: tuple[str, ...] = ()  # accelerators that the YAML allows
    nodes: int = 1  # as the YAML has it
    options: Options = field(default_factory=Options)

    def nodes_of(self, plan: Plan) -> int:
        return plan.num_nodes or self.nodes

    def price(self, plan: Plan) -> float | None:
        """Dollars per hour of a replica on this plan, at most; None = not known."""
        prices = {name.lower(): dollars for name, dollars in self.options.prices.items()}
        kinds = [plan.accelerators] if plan.accelerators else list(self.own)
        known = [prices.get(kind.lower()) for kind in kinds]
        if known and None not in known:
            return max(dollars for dollars in known if dollars is not None) * self.nodes_of(plan)
        return prices.get("")


class _Service(Protocol):
    @property
    def task(self) -> dict[str, Any]: ...
    @property
    def num_nodes(self) -> int: ...
    @property
    def policy(self) -> _Policy: ...


class _Policy(Protocol):
    @property
    def base_ondemand_fallback_replicas(self) -> int: ...
    @property
    def dynamic_ondemand_fallback(self) -> bool: ...


def menu(service: _Service, options: Options) -> Menu:
    """What the YAML and the flags allow together; a flag wins."""
    if not options.rented:
        return Menu(plans=(Plan(envs=options.envs, secrets=options.secrets),), options=options)
    said = options.plans or (Plan(options.gpus, options.num_nodes),)
    resources = service.task.get("resources") or {}
    spot = _market(resources, options.use_spot, fallback=service.policy.dynamic_ondemand_fallback)
    return Menu(
        plans=tuple(
            replace(plan, infra=options.infra, envs=options.envs, secrets=options.secrets) for plan in said
        ),
        market=spot,
        base_ondemand=service.policy.base_ondemand_fallback_replicas,
        own=tuple(_own(resources)),
        nodes=service.num_nodes,
        options=options,
    )


def _market(resources: Mapping[str, Any], said: bool | None, *, fallback: bool) -> Market:
    spot = {bool(one.get("use_spot")) for one in alternatives(resources)}
    if said is False:
        return Market.ON_DEMAND
    if said or spot == {True}:
        return Market.SPOT_FIRST if fallback else Market.SPOT
    if spot == {False}:
        return Market.YAML
    # Spot and on-demand of the same thing, which the DeepSeek-R1 README shows: two attempts that can be told
    # apart. If they differ in more than that, they are one.
    entries = resources.get("any_of") or resources.get("ordered") or []
    rest = [{key: value for key, value in one.items() if key != "use_spot"} for one in entries]
    return Market.SPOT_FIRST if all(one == rest[0] for one in rest) else Market.MIXED


def alternatives(resources: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of `any_of` or `ordered` over the common part; the whole, without either."""
    entries = resources.get("any_of") or resources.get("ordered") or [{}]
    common = {key: value for key, value in resources.items() if key not in ("any_of", "ordered")}
    return [{**common, **one} for one in entries]


def _own(resources: Mapping[str, Any]) -> list[str]:
    found: dict[str, None] = {}
    for one in alternatives(resources):
        asked = one.get("accelerators")
        if isinstance(asked, Mapping):
            # YAML reads `{H200:8}` as {"H200:8": null} and `{H200: 8}` as {"H200": 8}.
            texts = [f"{kind}" if count is None else f"{kind}:{count}" for kind, count in asked.items()]
        else:
            texts = [asked] if isinstance(asked, str) else list(asked or ())
        found |= {accelerators(text): None for text in map(str, texts) if _ACCELERATORS.fullmatch(text)}
    return list(found)


# ------------------------------------------------------------ what may be tried now


@dataclass(frozen=True, slots=True)
class Spending:
    """Of all services together: dollars per hour at this moment, and dollars within the last 24 hours."""

    hourly: float = 0.0
    day: float = 0.0


def choices(
    menu: Menu,
    now: float,
    *,
    losses: Sequence[float] = (),
    on_demand: int = 0,
    spending: Spending = Spending(),
) -> tuple[Plan, ...]:
    """Plans in the order in which to try them; empty when money forbids all (`refusal` says why).

    `losses`: times at which spot machines were taken from us. `on_demand`: replicas that run on-demand.
    """
    markets: tuple[bool | None, ...] = {
        Market.YAML: (None,),
        Market.MIXED: (None,),
        Market.ON_DEMAND: (False,),
        Market.SPOT: (True,),
        Market.SPOT_FIRST: (True, False),
    }[menu.market]
    mixed, falls_back = menu.market is Market.MIXED, menu.market in (Market.MIXED, Market.SPOT_FIRST)
    based = (mixed or True in markets) and on_demand < menu.base_ondemand
    if based or (falls_back and now < on_demand_until(losses)):
        markets = (False,)
    room = _room(menu, spending)
    found = []
    for spot in markets:
        for plan in menu.plans:
            price = menu.price(plan)
            if room is None:
                found.append(replace(plan, use_spot=spot, chosen=mixed))
            elif room > 0 and (price is None or price <= room):
                limit = room / menu.nodes_of(plan)
                most = limit if price is None else None
                found.append(replace(plan, use_spot=spot, chosen=mixed, max_hourly_cost=most))
    return tuple(found)


def refusal(menu: Menu, spending: Spending) -> str | None:
    """Why no launch is allowed, for people; None when money is no obstacle."""
    day, hour = menu.options.max_daily_cost, menu.options.max_hourly_cost
    if day is not None and spending.day >= day:
        return f"${spending.day:.2f} were spent within 24 hours, and --max-daily-cost is ${day:.2f}"
    room = _room(menu, spending)
    if room is None:
        return None
    prices = [menu.price(plan) for plan in menu.plans]
    known = [price for price in prices if price is not None]
    running = f"replicas cost ${spending.hourly:.2f} an hour now" if spending.hourly else ""
    if room <= 0:
        return f"{running or 'nothing may cost anything'}, and --max-hourly-cost is ${hour:.2f}"
    if len(known) == len(prices) and min(known) > room:
        cheapest = f"the cheapest plan costs ${min(known):.2f} an hour"
        return f"{running + ', ' if running else ''}{cheapest}, and --max-hourly-cost is ${hour:.2f}"
    return None


def _room(menu: Menu, spending: Spending) -> float | None:
    limit = menu.options.max_hourly_cost
    return None if limit is None else limit - spending.hourly


def on_demand_until(losses: Sequence[float]) -> float:
    """Until when spot is avoided; in the past (0 at the earliest) when it is not."""
    until, ordered = 0.0, sorted(losses)
    for first, last in zip(ordered, ordered[LOSSES - 1 :], strict=False):
        if last - first <= LOSSES_WITHIN:
            until = last + ON_DEMAND_FOR
    return until


def following(options: Sequence[Plan], last: Plan) -> Plan:
    """The plan to try after `last` had no capacity: the next one, the first after the end of the list."""
    names = [plan.name for plan in options]
    at = names.index(last.name) + 1 if last.name in names else 0
    return options[at % len(options)]


# ------------------------------------------------------------ what SkyPilot gets


def apply(task: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """`task` (changed, and returned) with the plan's hardware in place of the YAML's.

    In `any_of` and `ordered` too, where alternatives that have become equal are left out: they differed in
    what the plan decides. A plan of one node needs no fast network between nodes, and SkyPilot offers
    `network_tier: best` on few clouds. A plan that is `chosen` keeps those alternatives of the YAML that are
    on its market, where any other puts them all on it.
    """
    if plan.num_nodes is not None:
        task["num_nodes"] = plan.num_nodes
    said: dict[str, Any] = {
        "accelerators": plan.accelerators,
        "use_spot": plan.use_spot,
        "infra": plan.infra,
        "max_hourly_cost": plan.max_hourly_cost,
    }
    said = {key: value for key, value in said.items() if value is not None}
    gone = {*said, *(_WHERE if plan.infra else ()), *(("network_tier",) if plan.num_nodes == 1 else ())}
    if not gone:
        return task
    resources = dict(task.get("resources") or {})
    spot = bool(resources.get("use_spot"))
    for key in ("any_of", "ordered"):
        entries: list[dict[str, Any]] = []
        for one in resources.pop(key, None) or ():
            if plan.chosen and plan.use_spot not in (None, bool(one.get("use_spot", spot))):
                continue
            left = {name: value for name, value in one.items() if name not in gone}
            if left not in entries:
                entries.append(left)
        if entries and entries != [{}]:
            resources[key] = entries
    task["resources"] = {key: value for key, value in resources.items() if key not in gone} | said
    return task


def _count(text: str) -> str:
    return f"{float(text):g}"
