"""The options of `gateway up` (flags.py has their table) as one checked value.

`Settings` is frozen, and is what the supervisor hands to its children as JSON. All times are seconds, all
sizes bytes.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gateway.flags import SETTINGS, Setting
from replicas import costs, plans

__all__ = ["SETTINGS", "Setting", "Settings", "SettingsError", "make", "with_files"]

DEFAULT_CONFIG = "local.yaml"
MIN_KEY_CHARACTERS = 8
# sun_path of a unix socket is 104 bytes on macOS, 108 on Linux, the final zero included.
MAX_SOCKET_PATH_BYTES = 103
CONTROL_SOCKET = "control.sock"
# What `--limits-file` may say: what a worker looks up for each request.
LIMITS = (
    *("max_body", "max_waiting", "max_waiting_bytes", "upstream_timeout", "write_timeout"),
    *("commit_after", "beat_every", "beat_after"),
)


class SettingsError(ValueError):
    """An option that cannot work. The text is one line and says what to do next."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Validated options; `make` is the way to get one from input. `file` None = the embedded YAML."""

    file: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    admin_key: str | None = None
    state_dir: Path = field(default_factory=lambda: Path("~/.gateway").expanduser())
    provisioner: Literal["local", "static", "skypilot"] | None = None
    replica: tuple[str, ...] = ()
    replica_api_key: str | None = None
    replica_transport: Literal["tls", "plain"] | None = None
    replica_ca: str | None = None
    api_key: tuple[tuple[str, str], ...] = ()
    api_keys_file: str | None = None
    limits_file: str | None = None
    insecure_open: bool = False
    workers: int = 1
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: str | None = None
    max_body: int = 33_554_432
    max_waiting: int = 1000
    max_waiting_bytes: int = 1_073_741_824
    hold: Literal["beats", "silent", "reject"] = "beats"
    hold_max: float | None = None
    commit_after: float = 5.0
    beat_every: float = 8.0
    beat_after: float = 45.0
    upstream_timeout: float = 1800.0
    connect_timeout: float = 5.0
    write_timeout: float = 300.0
    drain_timeout: float = 30.0
    drain_limit: float = 3600.0
    provision_timeout: float = 1200.0
    idle_timeout: float | None = None
    target_in_flight: float | None = None
    window_max: int = 64
    min_replicas: int | None = None
    max_replicas: int | None = None
    model: str | None = None
    plan: tuple[str, ...] = ()
    gpus: str | None = None
    num_nodes: int | None = None
    use_spot: bool | None = None
    infra: str | None = None
    env: tuple[str, ...] = field(default=(), repr=False)
    secret: tuple[str, ...] = ()
    env_file: str | None = None
    max_hourly_cost: float | None = None
    max_daily_cost: float | None = None
    price: tuple[str, ...] = ()
    probe_interval: float | None = None
    upscale_delay: float | None = None
    keep_failed: float = 0.0
    dead_man: float = 7200.0
    downscale_delay: float | None = None

    @property
    def yaml(self) -> Path:
        """The YAML to serve: FILE, or the embedded default service."""
        return self.file or find_config(DEFAULT_CONFIG)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` gives back an equal value."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Settings:
        """A `gateway restart` may bring other code than the supervisor has: what it does not know is left
        out."""
        given = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        given["file"] = Path(given["file"]) if given.get("file") else None
        given["state_dir"] = Path(given["state_dir"])
        for name in ("replica", "plan", "env", "secret", "price"):
            given[name] = tuple(given.get(name, ()))
        given["api_key"] = tuple((name, key) for name, key in given.get("api_key", ()))
        return cls(**given)

    def __repr__(self) -> str:
        public, admin = f"{self.host}:{self.port}", f"{self.admin_host}:{self.admin_port}"
        return f"<Settings {public} admin {admin} state {self.state_dir}>"


def make(file: str | Path | None = None, **values: Any) -> Settings:
    """Settings from a person's input (strings of a command line or an environment). Raises SettingsError."""
    rows = {row.name: row for row in SETTINGS}
    for name in values:
        if name not in rows:
            raise SettingsError(f"unknown setting {name!r}: known are {', '.join(rows)}")
    full = {row.name: values.get(row.name, row.default) for row in SETTINGS}
    clean: dict[str, Any] = {name: _read(rows[name], value) for name, value in full.items()}
    clean["api_key"] = parse_api_keys(clean["api_key"])
    for name in ("replica_ca", "env_file", "api_keys_file", "limits_file"):
        if clean[name] is not None:
            clean[name] = str(Path(clean[name]).expanduser().absolute())
    clean["state_dir"] = Path(clean["state_dir"]).expanduser().absolute()
    settings = Settings(file=Path(file).expanduser() if file else None, **clean)
    with_files(settings)
    return settings


def with_files(settings: Settings) -> Settings:
    """What is in force: the flags, with what the files say now. Raises SettingsError."""
    changes: dict[str, Any] = {}
    if settings.api_keys_file is not None:
        flags = [f"{name}={key}" for name, key in settings.api_key]
        lines = [line for _, line in _lines(settings.api_keys_file, "--api-keys-file")]
        changes["api_key"] = parse_api_keys([*flags, *lines], "--api-keys-file")
    if settings.limits_file is not None:
        rows = {row.name: row for row in SETTINGS if row.name in LIMITS}
        for number, line in _lines(settings.limits_file, "--limits-file"):
            name, equals, value = (part.strip() for part in line.partition("="))
            name = name.removeprefix("--").replace("-", "_")
            if not equals or name not in rows:
                known = ", ".join(row.option[2:] for row in rows.values())
                raise SettingsError(
                    f"{settings.limits_file}, line {number}: wants NAME=VALUE, with NAME one of {known}"
                )
            changes[name] = _read(rows[name], value)
    settings = dataclasses.replace(settings, **changes)
    _check(settings)
    return settings


def _lines(path: str, option: str) -> list[tuple[int, str]]:
    """The lines of a file that say something, with their numbers."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{option} {path}: {getattr(error, 'strerror', None) or error}") from None
    lines = [(number, line.partition("#")[0].strip()) for number, line in enumerate(text.splitlines(), 1)]
    return [(number, line) for number, line in lines if line]


def parse_api_keys(texts: Iterable[str], option: str = "--api-key") -> tuple[tuple[str, str], ...]:
    """(name, key) pairs from `NAME=KEY` texts, each of which may hold several, split by commas or spaces.

    `option`: where they come from, for errors.
    """
    pairs: dict[str, str] = {}
    for text in texts:
        for item in re.split(r"[,\s]+", text.strip()):
            if not item:
                continue
            name, equals, key = item.partition("=")
            if not (name and equals):
                raise SettingsError(f"{option} wants NAME=KEY, like alice=$(openssl rand -hex 24)")
            if len(key) < MIN_KEY_CHARACTERS:
                raise SettingsError(
                    f"{option}, {name}=...: the key has {len(key)} characters, at least"
                    f" {MIN_KEY_CHARACTERS} are needed; make one with `openssl rand -hex 24`"
                )
            if name in pairs:
                raise SettingsError(f"{option}: the name {name!r} is there twice; give each key its own")
            pairs[name] = key
    return tuple(pairs.items())


def is_loopback(host: str) -> bool:
    """True when only this machine can reach `host`. An unknown name counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def find_config(name: str) -> Path:
    """A file of `config/`: shipped inside an installed wheel, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "_config", here.parent / "config"):
        if (folder / name).is_file():
            return folder / name
    raise SettingsError(f"config/{name} is missing here: install skygate again, or name a FILE")


def guess_provisioner(settings: Settings) -> Literal["local", "static", "skypilot"]:
    """`--provisioner`, or when left out: static with URLs, local without a FILE, else skypilot."""
    if settings.provisioner is not None:
        return settings.provisioner
    if settings.replica:
        return "static"
    if settings.file is None:
        return "local"
    try:
        embedded = settings.file.samefile(find_config(DEFAULT_CONFIG))
    except (OSError, SettingsError):
        embedded = False
    return "local" if embedded else "skypilot"


def _read(row: Setting, value: Any) -> Any:
    """One value in its kind's type."""
    if value is None or value == "":
        return row.default if row.default is None else _read(row, row.default)
    try:
        match row.kind:
            case "int":
                return int(value)
            case "duration":
                return costs.duration(str(value))
            case "float":
                number = float(value)
                if number != number or number in (float("inf"), float("-inf")):
                    raise ValueError
                return number
            case "flag" | "switch":
                return value if isinstance(value, bool) else _flag(str(value))
            case "texts":
                items = re.split(row.split, value.strip()) if isinstance(value, str) else value
                return tuple(str(item) for item in items if item)
            case _:
                text = str(value)
    except ValueError:
        words = {"int": "a whole number", "float": "a number", "duration": "a duration such as 30m or 2h"}
        what = words.get(row.kind, "true or false")
        raise SettingsError(f"{row.option} ({row.env}) wants {what}, not {value!r}") from None
    if row.choices and text not in row.choices:
        raise SettingsError(f"{row.option} ({row.env}) is one of {', '.join(row.choices)}, not {text!r}")
    return text


def _flag(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError


# Smallest allowed value of each number; everything else that is a number must be > 0.
_LEAST: dict[str, float] = {
    **dict.fromkeys(("port", "admin_port", "beat_after", "commit_after"), 0),
    **dict.fromkeys(("max_waiting", "max_waiting_bytes"), 0),
    **dict.fromkeys(("min_replicas", "max_replicas", "idle_timeout", "drain_timeout"), 0),
    **dict.fromkeys(("drain_limit", "upscale_delay", "downscale_delay"), 0),
    **dict.fromkeys(("workers", "window_max", "max_body"), 1),
}
_MOST: dict[str, float] = {"port": 65535, "admin_port": 65535, "workers": 64}


def _check(settings: Settings) -> None:
    for row in SETTINGS:
        value = getattr(settings, row.name)
        if row.kind not in ("int", "float") or value is None:
            continue
        least, most = _LEAST.get(row.name), _MOST.get(row.name)
        if least is None and value <= 0:
            raise SettingsError(f"{row.option} must be more than 0, not {value:g}")
        if least is not None and value < least:
            raise SettingsError(f"{row.option} must be at least {least:g}, not {value:g}")
        if most is not None and value > most:
            raise SettingsError(f"{row.option} must be at most {most:g}, not {value:g}")
    if not is_loopback(settings.host) and not settings.api_key and not settings.insecure_open:
        raise SettingsError(
            f"--host {settings.host} lets other machines in, and without API keys they could start replicas"
            " at your cost: add --api-key NAME=KEY (or GATEWAY_API_KEYS, or --api-keys-file), or"
            " --insecure-open if you mean it"
        )
    if not is_loopback(settings.admin_host) and not settings.admin_key:
        raise SettingsError(
            f"--admin-host {settings.admin_host} lets other machines in: add --admin-key KEY"
            " (or GATEWAY_ADMIN_KEY), or leave the admin port on 127.0.0.1"
        )
    if settings.admin_key is not None and len(settings.admin_key) < MIN_KEY_CHARACTERS:
        raise SettingsError(f"--admin-key: {MIN_KEY_CHARACTERS} characters or more; `openssl rand -hex 24`")
    if settings.port and (settings.host, settings.port) == (settings.admin_host, settings.admin_port):
        raise SettingsError(f"--port and --admin-port are both {settings.port}: change one of them")
    _check_replicas(settings)
    _check_plans(settings)
    socket_path = settings.state_dir / CONTROL_SOCKET
    size = len(str(socket_path).encode())
    if size > MAX_SOCKET_PATH_BYTES:
        raise SettingsError(
            f"--state-dir {settings.state_dir} is too long for the unix socket inside it ({size} bytes,"
            f" at most {MAX_SOCKET_PATH_BYTES}): choose a shorter path"
        )
    if settings.file is not None and not settings.file.is_file():
        raise SettingsError(f"{settings.file}: no such file; name a SkyPilot YAML, or no FILE to try it here")


def _check_plans(settings: Settings) -> None:
    if settings.plan and (settings.gpus or settings.num_nodes):
        raise SettingsError("--plan says accelerators and nodes itself: leave out --gpus and --num-nodes")
    for option, read in (("--plan", settings.plan), ("--price", settings.price)):
        try:
            plans.parse_prices(read) if option == "--price" else [plans.parse(text) for text in read]
        except plans.PlanError as error:
            raise SettingsError(f"{option}: {error}") from None
    try:
        plans.accelerators(settings.gpus or "any")
    except plans.PlanError as error:
        raise SettingsError(f"--gpus: {error}") from None


def _check_replicas(settings: Settings) -> None:
    low, high = settings.min_replicas, settings.max_replicas
    if low is not None and high is not None and low > high:
        raise SettingsError(f"--min-replicas {low} is more than --max-replicas {high}")
    if settings.replica and settings.provisioner not in (None, "static"):
        raise SettingsError(f"--replica goes with --provisioner static, not {settings.provisioner}")
    if settings.provisioner == "static" and not settings.replica:
        raise SettingsError("--provisioner static needs at least one --replica URL (or GATEWAY_REPLICAS)")
    for url in settings.replica:
        if not re.fullmatch(r"https?://[^/?#@\s]+/?", url):
            raise SettingsError(f"--replica {url}: wants http(s)://HOST:PORT and nothing after it")
    if len(set(settings.replica)) != len(settings.replica):
        raise SettingsError("--replica: the same URL is given twice; each server is named once")
