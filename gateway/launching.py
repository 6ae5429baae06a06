"""What a person says about launches: plans, prices, limits, and the variables that replicas get.

Values are secrets until proven otherwise. They are kept in `<state>/variables.json` (0600), so that a gateway
that starts after a reboot, without the environment or the file they came from, still has them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.settings import SettingsError
from replicas import plans
from replicas.plans import Options

if TYPE_CHECKING:
    from gateway.settings import Settings
    from replicas.spec import Service

FILE = "variables.json"
_NAME = re.compile(r"[a-zA-Z_]\w*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Variables:
    """By name: `--env`, `--secret` and the lines of `--env-file`, each with its value."""

    envs: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: dict[str, str] = field(default_factory=dict, repr=False)
    file: dict[str, str] = field(default_factory=dict, repr=False)

    def all(self) -> dict[str, str]:
        return {**self.file, **self.envs, **self.secrets}


NO_VARIABLES = Variables()


def kept(state_dir: Path) -> Variables:
    """Those of the last start; none when there was none, or nothing readable is left of it."""
    try:
        values = json.loads((state_dir / FILE).read_text())
        parts = [{str(k): str(v) for k, v in values[part].items()} for part in ("envs", "secrets", "file")]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Variables()
    return Variables(*parts)


def keep(state_dir: Path, variables: Variables) -> None:
    """For the next start. The whole file or none of it, readable by us alone."""
    path, part = state_dir / FILE, state_dir / f"{FILE}.new"
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(variables), file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def variables(settings: Settings, environ: Mapping[str, str], last: Variables) -> Variables:
    """Each name that the flags ask for, with its value: the one given now, else that of the `last` start.

    Raises SettingsError for a name without any value. What is not asked for any more is dropped.
    """
    envs: dict[str, str] = {}
    for text in settings.env:
        name, equals, value = text.partition("=")
        envs[_name("--env", name)] = value if equals else _value("--env", name, environ, last.envs)
    secrets: dict[str, str] = {}
    for name in settings.secret:
        if "=" in name:
            what = name.partition("=")[0]
            raise SettingsError(
                f"--secret {what}=...: everybody on this machine can read a command line; put the value into"
                f" the environment ({what}=... gateway up --secret {what}) or into an --env-file"
            )
        secrets[name] = _value("--secret", _name("--secret", name), environ, last.secrets)
    return Variables(envs, secrets, _file(settings.env_file, last.file) if settings.env_file else {})


def _name(option: str, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{option} {name}: is not a variable's name (letters, digits and _)")
    return name


def _value(option: str, name: str, environ: Mapping[str, str], last: Mapping[str, str]) -> str:
    value = environ.get(name, last.get(name))
    if value is None:
        raise SettingsError(f"{option} {name}: has no value; export {name} before starting the gateway")
    return value


def _file(path: str, last: Mapping[str, str]) -> dict[str, str]:
    """Lines `NAME=VALUE` as `docker --env-file` and `sky launch --env-file` take them."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        if last:
            return dict(last)
        raise SettingsError(f"--env-file {path}: cannot be read: {error}") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.partition("=")
        name, value = name.strip(), value.strip()
        if not equals or not _NAME.fullmatch(name):
            raise SettingsError(f"--env-file {path}: line {number} is not NAME=VALUE")
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        found[name] = value[1:-1] if quoted else value
    return found


def options(settings: Settings, known: Variables) -> Options:
    """The flags as the controller takes them. Raises PlanError for what `make` has not seen."""
    rented = settings.provisioner == "skypilot"
    return Options(
        plans=tuple(map(plans.parse, settings.plan)),
        gpus=plans.accelerators(settings.gpus) if settings.gpus else None,
        num_nodes=settings.num_nodes,
        use_spot=settings.use_spot,
        infra=settings.infra,
        prices=plans.parse_prices(settings.price),
        max_hourly_cost=settings.max_hourly_cost,
        max_daily_cost=settings.max_daily_cost,
        envs=known.envs,
        secrets={**known.file, **known.secrets},
        rented=rented,
    )


def price_flags(kinds: Iterable[str]) -> str:
    """What says the price of each of these kinds of machine."""
    return " ".join(f"--price {kind}=DOLLARS" for kind in kinds)


def replica_price(settings: Settings) -> float | None:
    """`--price 2`: dollars per hour of a local or static replica."""
    return plans.parse_prices(settings.price).get("")


def dead_man(settings: Settings, service: Service) -> float:
    """Seconds that a replica outlives us at most: `--dead-man`, but no less than a cold start may take, nor
    than a failed machine is kept for."""
    cold_start = settings.provision_timeout + service.probe.initial_delay_seconds
    return max(settings.dead_man, cold_start, settings.keep_failed)
