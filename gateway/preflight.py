"""`gateway check FILE`: what would be launched, for how much, and what is missing for it, with its fix.

Nothing is started and nothing is asked of a cloud: files, environment, installed packages, and SkyPilot's
catalogues as far as they are here. What only a cloud can tell (capacity, quotas, permissions) a launch tells.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gateway import launching, transport
from gateway.settings import Settings, SettingsError
from replicas import command, plans
from replicas.plans import Menu, Options, Plan
from replicas.provisioners import catalogue
from replicas.provisioners.catalogue import Prices
from replicas.spec import Service

SKYPILOT: Final = "0.14.1"


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind`: package, binary, credential, quota, port, pin, price or transport. `fix`: what to do."""

    kind: str
    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Cloud:
    """What SkyPilot needs on this machine for one cloud (sky/clouds/*.py: check_credentials)."""

    name: str
    credentials: tuple[str, ...]  # files below the home folder, any of them
    variables: tuple[str, ...] = ()  # or one of these
    package: str = ""  # an import
    binaries: tuple[str, ...] = ()
    login: str = ""


CLOUDS: Final = (
    Cloud("aws", (".aws/credentials", ".aws/config"), ("AWS_ACCESS_KEY_ID",), "boto3", (), "aws configure"),
    Cloud(
        "gcp",
        (".config/gcloud/application_default_credentials.json",),
        ("GOOGLE_APPLICATION_CREDENTIALS",),
        "googleapiclient",
        ("gcloud",),
        "gcloud auth application-default login",
    ),
    Cloud("azure", (".azure/azureProfile.json",), (), "azure.identity", ("az",), "az login"),
    Cloud(
        "kubernetes",
        (".kube/config",),
        ("KUBECONFIG",),
        "kubernetes",
        ("kubectl", "socat", "nc"),
        "a kubeconfig in ~/.kube/config",
    ),
    Cloud("lambda", (".lambda_cloud/lambda_keys",), (), "", (), "a key in ~/.lambda_cloud/lambda_keys"),
    Cloud("runpod", (".runpod/config.toml",), ("RUNPOD_API_KEY",), "runpod", (), "runpod config"),
    Cloud(
        "nebius",
        (".nebius/credentials.json", ".nebius/NEBIUS_IAM_TOKEN.txt"),
        (),
        "nebius",
        (),
        "a token in ~/.nebius",
    ),
    Cloud("slurm", (".slurm/config",), (), "hostlist", (), "the login node in ~/.slurm/config"),
)
"""The clouds for which this package has an extra."""

_INFRA: Final = {"k8s": "kubernetes"}
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_REVISION: Final = re.compile(r'--revision[ =]"?\$\{?(\w+)')


@dataclass(frozen=True, slots=True)
class Machine:
    """This machine, as the checks see it."""

    home: Path
    environ: Mapping[str, str]
    which: Callable[[str], str | None] = shutil.which
    version: Callable[[str], str | None] = lambda name: _version(name)
    importable: Callable[[str], bool] = lambda name: _importable(name)
    prices: Callable[[Sequence[str], Path], Prices] = catalogue.ask

    @classmethod
    def this(cls) -> Machine:
        return cls(Path.home(), os.environ)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


# ------------------------------------------------------------ plans and prices


def offers(menu: Menu, machine: Machine) -> list[dict[str, Any]]:
    """Each plan in its order, with dollars per hour of a replica and where that figure is from."""
    tried = plans.choices(menu, 0.0)
    tried = tried or plans.choices(_unlimited(menu), 0.0)
    kinds = {kind for plan in tried for kind in _kinds(menu, plan)}
    unpriced = _unpriced(menu, kinds)
    listed = machine.prices(unpriced, machine.home) if menu.options.rented else {}
    return [_offer(menu, plan, listed) for plan in tried]


def _offer(menu: Menu, plan: Plan, listed: Prices) -> dict[str, Any]:
    price, source = menu.price(plan), "--price"
    if price is None:
        market = "spot" if plan.use_spot else "on-demand"
        found = [listed.get(kind, {}).get(market) for kind in _kinds(menu, plan)]
        known = [one for one in found if one is not None]
        if known:  # of what the YAML leaves open SkyPilot takes the cheapest
            cheapest = min(known, key=lambda one: one.dollars)
            price = cheapest.dollars * menu.nodes_of(plan)
            source = f"SkyPilot's catalogue ({cheapest.cloud})"
    limit = menu.options.max_hourly_cost
    return {
        "plan": plan.name or "as the YAML says",
        "accelerators": [plan.accelerators] if plan.accelerators else list(menu.own),
        "nodes": menu.nodes_of(plan),
        "spot": plan.use_spot,
        "price": price,
        "price_source": None if price is None else source,
        "unpriced": _unpriced(menu, _kinds(menu, plan)) if price is None else [],
        "refused": price is not None and limit is not None and price > limit,
    }


def _kinds(menu: Menu, plan: Plan) -> tuple[str, ...]:
    return (plan.accelerators,) if plan.accelerators else menu.own


def _unpriced(menu: Menu, kinds: Iterable[str]) -> list[str]:
    """Those that no --price names."""
    given = {kind.lower() for kind in menu.options.prices}
    return sorted(kind for kind in kinds if kind.lower() not in given)


def _unlimited(menu: Menu) -> Menu:
    options = menu.options
    return Menu(
        menu.plans, menu.market, menu.base_ondemand, menu.own, menu.nodes, Options(prices=options.prices)
    )


def ceiling(found: Sequence[Mapping[str, Any]], replicas: int, limit: float | None) -> float | None:
    """Most dollars per hour that all replicas together can cost; None when a price is not known."""
    prices = [offer["price"] for offer in found if not offer["refused"]]
    if replicas == 0 or not prices:
        return 0.0
    most: float | None = None if None in prices else max(prices) * replicas
    if most is None or limit is None:
        return most if limit is None else limit
    return min(limit, most)


# ------------------------------------------------------------ what is missing


def report(service: Service, settings: Settings, options: Options, machine: Machine) -> dict[str, Any]:
    """Plans, ceiling and findings, as `gateway check --json` has them."""
    menu = plans.menu(service, options)
    found = offers(menu, machine) if options.rented else []
    said = settings.max_replicas
    replicas = service.policy.max_replicas if said is None else said
    return {
        "provisioner": settings.provisioner,
        "plans": found,
        "max_replicas": replicas,
        "max_hourly_cost": options.max_hourly_cost,
        "ceiling": ceiling(found, replicas, options.max_hourly_cost) if options.rented else None,
        "findings": [asdict(one) for one in findings(service, settings, options, found, machine)],
    }


def findings(
    service: Service,
    settings: Settings,
    options: Options,
    found: Sequence[Mapping[str, Any]],
    machine: Machine,
) -> list[Finding]:
    missing = [*_ports(settings), *_transport(service, settings)]
    if settings.provisioner == "local":
        missing += _binaries(("bash",), machine)
    if settings.provisioner == "skypilot":
        missing += [*_skypilot(service, options, machine), *_pins(service, options), *_prices(found)]
    return missing


def _prices(found: Sequence[Mapping[str, Any]]) -> list[Finding]:
    unknown = {kind for offer in found for kind in offer["unpriced"]}
    refused = [offer["plan"] for offer in found if offer["refused"]]
    missing = []
    if unknown:
        kinds = sorted(unknown)
        what = f"of {', '.join(kinds)}: no catalogue on this machine has it"
        fix = f"{launching.price_flags(kinds)} (an hour, of one node), or --price DOLLARS (of any replica)"
        missing.append(Finding("price", what, fix))
    if refused:
        what = f"{', '.join(refused)}: over --max-hourly-cost, never launched"
        missing.append(Finding("price", what, "a higher limit, or leave the plan out"))
    return missing


def _skypilot(service: Service, options: Options, machine: Machine) -> list[Finding]:
    found = []
    have = machine.version("skypilot")
    if have != SKYPILOT:
        what = f"skypilot {have} is installed, {SKYPILOT} is known to work" if have else "skypilot is missing"
        found.append(Finding("package", what, f"pip install skypilot=={SKYPILOT}"))
    if server := machine.environ.get("SKYPILOT_API_SERVER_ENDPOINT"):
        return [*found, Finding("credential", f"not checked: {_host(server)} has them", "sky check")]
    found += _binaries(("ssh", "rsync"), machine)
    wanted = _wanted(service, options)
    ready = [cloud for cloud in CLOUDS if _credentials(cloud, machine)]
    if wanted:
        looked = [cloud for cloud in CLOUDS if cloud.name in wanted]
        found += [
            Finding("credential", f"none for {cloud.name}", f"{cloud.login}; then `sky check {cloud.name}`")
            for cloud in looked
            if cloud not in ready
        ]
    else:
        looked = ready
        if not ready:
            names = ", ".join(cloud.name for cloud in CLOUDS)
            fix = "log in to one, such as `aws configure`; `sky check` lists what it finds"
            found.append(Finding("credential", f"none for any of {names}", fix))
    for cloud in looked:
        if cloud.package and not machine.importable(cloud.package):
            fix = f"pip install 'skygate[{cloud.name}]'"
            found.append(Finding("package", f"{cloud.name} needs the Python package {cloud.package}", fix))
        found += _binaries(cloud.binaries, machine, f" ({cloud.name})")
    for cloud in looked:
        if cloud.name in ("aws", "gcp", "azure") and cloud in ready:
            what = f"of GPUs on {cloud.name}: only the cloud knows it, and new accounts have none"
            found.append(Finding("quota", what, "ask for it in the cloud's console before the first launch"))
    return found


def _wanted(service: Service, options: Options) -> set[str]:
    """Names of the clouds that the YAML or --infra pins; empty when any will do."""
    if options.infra:
        return {_cloud(options.infra)}
    resources = plans.alternatives(service.task.get("resources") or {})
    pinned = [one.get("infra") or one.get("cloud") for one in resources]
    return {_cloud(str(where)) for where in pinned} if all(pinned) else set()


def _cloud(infra: str) -> str:
    name = infra.partition("/")[0].lower()
    return _INFRA.get(name, name)


def _credentials(cloud: Cloud, machine: Machine) -> bool:
    return any((machine.home / path).exists() for path in cloud.credentials) or any(
        machine.environ.get(name) for name in cloud.variables
    )


def _binaries(names: Sequence[str], machine: Machine, why: str = "") -> list[Finding]:
    missing = [name for name in names if machine.which(name) is None]
    return [
        Finding("binary", f"{name} is not on the PATH{why}", f"install {name} with the system's packages")
        for name in missing
    ]


def _ports(settings: Settings) -> list[Finding]:
    found = []
    for option, host, port in (
        ("--port", settings.host, settings.port),
        ("--admin-port", settings.admin_host, settings.admin_port),
    ):
        if port and not _free(host, port):
            taken = f"{host}:{port} is taken"
            found.append(Finding("port", taken, f"end what listens there, or give another with {option}"))
    return found


def _free(host: str, port: int) -> bool:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return True
    except OSError:
        return False


def _transport(service: Service, settings: Settings) -> list[Finding]:
    """What `up` would warn of or refuse."""
    fix = "--ssl-keyfile and --ssl-certfile in run, as the files of config/ have them"
    try:
        doubt = transport.check(settings, service)
    except SettingsError as error:
        return [Finding("transport", str(error), fix)]
    return [Finding("transport", doubt, fix)] if doubt else []


def _pins(service: Service, options: Options) -> list[Finding]:
    """What the same YAML may give something else tomorrow."""
    found = []
    installs = [line for line in service.setup.splitlines() if "install" in line and "sglang" in line]
    if any("==" not in line and " @ " not in line for line in installs):
        fix = '`"sglang[all]==0.5.23"` in setup'
        found.append(Finding("pin", "setup installs any version of SGLang", fix))
    found += _weights(service.run, {**service.envs, **options.envs, **options.secrets})
    for one in plans.alternatives(service.task.get("resources") or {}):
        image = str(one.get("image_id") or "")
        name = image.removeprefix("docker:").rpartition("/")[2]
        if not image:
            what = "the machine's image is whichever SkyPilot's catalogue names that day"
            found.append(Finding("pin", what, "`image_id` in resources, once one is known to work"))
        elif image.startswith("docker:") and (":" not in name or name.endswith(":latest")):
            fix = "a tag or digest in image_id"
            found.append(Finding("pin", f"the image {image} may change under you", fix))
    return list(dict.fromkeys(found))


def _weights(run: str, envs: Mapping[str, str]) -> list[Finding]:
    """A repository without a commit: its owner may put other weights there."""
    model = command.flag(run, envs, "--model-path", "--model")
    if not model or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return []
    variable = _REVISION.search(run)  # also within ${MODEL:+...}, which `command.flag` does not read
    given = envs.get(variable[1]) if variable else command.flag(run, envs, "--revision")
    if given and _COMMIT.fullmatch(given):
        return []
    where = f"--env {variable[1]}=COMMIT" if variable else "`--revision COMMIT` in run"
    commits = f"a commit of https://huggingface.co/{model}/commits/main"
    return [Finding("pin", f"the weights of {model} may change under you", f"{where}, {commits}")]


def _host(url: str) -> str:
    """Without a password in it."""
    return url.rpartition("@")[2].removeprefix("https://").removeprefix("http://")
