"""A service, read from a SkyPilot YAML: the very file that `sky launch` and `sky serve up` take.

PURE: text in, `Service` out; only pydantic and the YAML parser beside the standard library. The accepted
schema is that of SkyPilot 0.14.1 (`sky/utils/schemas.py: get_service_schema, get_task_schema`;
`sky/serve/service_spec.py` for the meaning) and three shapes that SkyPilot's own DeepSeek-R1 README shows
although 0.14.1 rejects them: `service.initial_delay_seconds`, different `min_replicas` and `max_replicas`
without a QPS target, and `any_of` with spot and on-demand. Whatever is wrong is one line: file, YAML path,
what is allowed. What is accepted but odd is a line of `Service.warnings`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from replicas import command, document
from replicas.document import SpecError
from replicas.schema import ReadinessProbe, ReplicaPolicy, Section, Task, explain

__all__ = ["ReadinessProbe", "ReplicaPolicy", "Service", "SpecError", "load", "parse"]

REPLICA_KEY = "REPLICA_API_KEY"
"""The secret through which the gateway gives a replica its API key; it needs no value in the YAML."""

_VARIABLE = re.compile(r"\$\{?\b([a-zA-Z_][a-zA-Z0-9_]*)\b\}?")
"""SkyPilot's own pattern for variables in `service:` (sky/task.py: _fill_in_env_vars)."""


@dataclass(frozen=True, slots=True, repr=False)
class Service:
    """What one YAML describes. Times in seconds; nothing here says anything about a running replica."""

    name: str
    """Legal as the head of a cluster name: `[a-z]([-a-z0-9]*[a-z0-9])?`, at most 40 characters."""
    model: str
    """The name that `/v1/models` lists: the HF name or path that `run` serves, or the one given."""
    probe: ReadinessProbe
    policy: ReplicaPolicy
    port: int
    stream_timeout_seconds: float | None
    """`load_balancer.stream_timeout_seconds`: longest silence of a replica, in seconds; None = not in
    the YAML."""
    load_balancing_policy: str
    tls: Mapping[str, str] | None
    num_nodes: int
    setup: str
    run: str
    envs: dict[str, str]
    secrets: dict[str, str]
    """Secrets with a value; one without (`KEY: null`) that the environment does not have either is absent."""
    task: dict[str, Any] = field(hash=False)
    """The YAML without `service:`: what SkyPilot gets. Copy it before handing it over, SkyPilot empties
    it."""
    text: str
    hash: str
    """sha256 of `text`, hex: two replicas with the same hash come from the same YAML."""
    source: str
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:  # never the secrets
        replicas = f"{self.policy.min_replicas}..{self.policy.max_replicas}"
        return f"<Service {self.name} model={self.model} replicas={replicas} hash={self.hash[:8]}>"


def load(
    path: str | Path,
    *,
    name: str | None = None,
    model: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Service:
    """`parse` the file at `path`. Raises SpecError, also when the file cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    return parse(text, str(path), name=name, model=model, environ=environ)


def parse(
    text: str,
    source: str,
    *,
    name: str | None = None,
    model: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Service:
    """The service that `text` describes; `source` is the file's name, for messages and as the default
    name.

    `name` and `model` win over the YAML. `environ` gives values to `envs:` and `secrets:` without one
    (`HF_TOKEN: null`), as `sky launch --env HF_TOKEN` does. Raises SpecError.
    """
    try:
        return _parse(text, source, name, model, environ or {})
    except SpecError as error:
        raise SpecError(document.one_line(f"{source}: {error}")) from None


def _parse(
    text: str, source: str, name: str | None, model: str | None, environ: Mapping[str, str]
) -> Service:
    raw = document.read(text)
    if "service" not in raw and "pool" not in raw:
        raise SpecError(
            "service: is missing; add for example "
            "`service: {readiness_probe: /health, replica_policy: {min_replicas: 0, max_replicas: 2}}`"
        )
    warnings: list[str] = []
    envs = _values(raw, "envs", environ)
    secrets = _values(raw, "secrets", environ)
    raw["service"] = _fill_in(raw.get("service"), envs | secrets)
    try:
        parsed = Task.model_validate(raw)
    except ValidationError as error:
        raise SpecError(explain(error)) from None
    section = parsed.service
    if not parsed.run or not parsed.run.strip():
        raise SpecError(
            "run: is missing; it must start the server, such as `python -m sglang.launch_server ...`"
        )
    for key in parsed.envs or {}:
        if key not in envs:
            raise SpecError(
                f"envs.{key}: has no value; write one here or export {key} before starting the gateway"
            )
    warnings += [
        f"secrets.{key}: has no value here or in the environment; SkyPilot must know it"
        for key in parsed.secret_names()
        if key not in secrets and key not in (REPLICA_KEY, command.TLS_KEY, command.TLS_CERT)
    ]

    candidates = _candidates(parsed.resources or {})
    _check_spot(section, candidates, warnings)
    port = _port(section, candidates, warnings)
    _check_run(parsed.run, envs, port, warnings)
    given = name or parsed.name or Path(source).stem
    legal = _legal_name(given)
    if (name or parsed.name) and legal != given:
        warnings.append(f"name: {given!r} is not a legal cluster name; the service is called {legal!r}")
    found = model or command.model(parsed.run, envs)
    if found is None:
        warnings.append(
            f"run: names no model (--model-path NAME); /v1/models calls it {legal!r} (--model changes that)"
        )
    task = {key: value for key, value in raw.items() if key != "service"}
    if envs:
        task["envs"] = dict(envs)
    return Service(
        name=legal,
        model=found or legal,
        probe=section.probe(warnings),
        policy=section.policy(warnings),
        port=port,
        stream_timeout_seconds=section.load_balancer.stream_timeout_seconds
        if section.load_balancer
        else None,
        load_balancing_policy=section.balancing(warnings),
        tls=section.tls_files(warnings),
        num_nodes=parsed.num_nodes or 1,
        setup=parsed.setup or "",
        run=parsed.run,
        envs=envs,
        secrets=secrets,
        task=task,
        text=text,
        hash=hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest(),
        source=source,
        warnings=tuple(map(document.one_line, warnings)),
    )


def _values(raw: Mapping[str, Any], key: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Variables of `envs` or `secrets` that have a value; numbers and booleans become text as SkyPilot
    does it (`str`)."""
    section = raw.get(key)
    if not isinstance(section, dict):
        return {}  # absent, a list of references (`secrets: [secrets:NAME]`), or wrong: the schema says so
    values = {str(k): environ.get(str(k)) if v is None else str(v) for k, v in section.items()}
    return {k: v for k, v in values.items() if v is not None}


def _fill_in(value: Any, variables: Mapping[str, str]) -> Any:
    """`$NAME` and `${NAME}` in the strings of `service:`, replaced where the variable is known, else
    left alone."""
    if isinstance(value, str):
        return _VARIABLE.sub(lambda match: variables.get(match[1], match[0]), value)
    if isinstance(value, dict):
        return {key: _fill_in(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill_in(item, variables) for item in value]
    return value


def _legal_name(given: str) -> str:
    legal = re.sub(r"[^a-z0-9]+", "-", given.lower()).strip("-")
    if not legal:
        return "service"
    return (legal if legal[0].isalpha() else f"s-{legal}")[:40].rstrip("-")


def _candidates(resources: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every alternative that SkyPilot may pick, with its YAML path: the entries of any_of or ordered
    over the common part."""
    lists = [key for key in ("any_of", "ordered") if resources.get(key) is not None]
    if len(lists) == 2:
        raise SpecError("resources: has both any_of and ordered; only one of them is allowed")
    if not lists:
        return [("resources", resources)]
    common = {key: value for key, value in resources.items() if key != lists[0]}
    entries = resources[lists[0]]
    if not isinstance(entries, list) or not entries:
        raise SpecError(f"resources.{lists[0]}: must be a list of resources, not {document.shown(entries)}")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise SpecError(
                f"resources.{lists[0]}[{index}]: must be a mapping of resources, not {document.shown(entry)}"
            )
    return [(f"resources.{lists[0]}[{i}]", {**common, **entry}) for i, entry in enumerate(entries)]


def _check_spot(
    section: Section, candidates: list[tuple[str, Mapping[str, Any]]], warnings: list[str]
) -> None:
    spot = [bool(resources.get("use_spot")) for _, resources in candidates]
    if asked := section.needs_spot():
        if not any(spot):
            raise SpecError(f"service.replica_policy.{asked}: needs `use_spot: true` in resources")
        if not all(spot):
            warnings.append(
                f"service.replica_policy.{asked}: sky serve wants use_spot on all of any_of; accepted"
            )
    elif any(spot) and not all(spot):
        warnings.append("resources: mixes spot and on-demand, which sky serve rejects; accepted here")


def _port(section: Section, candidates: list[tuple[str, Mapping[str, Any]]], warnings: list[str]) -> int:
    """`service.ports`, else the only port of the resources, which all alternatives must share."""
    opened = {path: _ports(f"{path}.ports", resources.get("ports")) for path, resources in candidates}
    if section.ports is not None:
        if any(section.ports not in ports for ports in opened.values()):
            warnings.append(
                f"resources.ports: does not open {section.ports} (service.ports), so SkyPilot will not either"
            )
        return section.ports
    for path, ports in opened.items():
        if not ports:
            path = path if any(opened.values()) else "resources"
            raise SpecError(
                f"{path}.ports: is missing; name the one port that the server listens on, such as 30000"
            )
        if len(ports) > 1:
            raise SpecError(f"{path}.ports: opens {len(ports)} ports; service.ports must name the server's")
    if len(different := sorted(set().union(*opened.values()))) > 1:
        raise SpecError(
            f"resources.ports: must be the same in every alternative, not {' and '.join(map(str, different))}"
        )
    return different[0]


def _ports(path: str, value: Any) -> set[int]:
    """A port, a range such as "8000-8010", or a list of both, as SkyPilot has it."""
    if value is None:
        return set()
    if isinstance(value, list):
        return set().union(*(_ports(f"{path}[{i}]", item) for i, item in enumerate(value)))
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(value), re.ASCII)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last <= 65535:
        allowed = 'a port from 1 to 65535 or a range such as "8000-8010"'
        raise SpecError(f"{path}: must be {allowed}, not {document.shown(value)}")
    return set(range(first, last + 1))


def _check_run(run: str, envs: Mapping[str, str], port: int, warnings: list[str]) -> None:
    said = command.flag(run, envs, "--port")
    if said and said.isdecimal() and int(said) != port:
        warnings.append(f"run: starts the server on --port {said}, but the service's port is {port}")
    if not command.has_flag(run, "--api-key"):
        warnings.append(
            f'run: has no --api-key "${REPLICA_KEY}"; anybody who finds the replica\'s port can use it'
        )
    if command.has_flag(run, "--enable-dp-attention"):
        warnings.append("run: --enable-dp-attention is deprecated since SGLang 0.5 (use --attn-dp-size N)")
