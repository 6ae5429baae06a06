"""Every option of `gateway up`, in one table: name, default, kind, one sentence, environment variable.

PURE. `cli.py` makes its options from `SETTINGS`, the README's table is generated from it, and
`settings.py` reads and checks values by it. All times are seconds, all sizes bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["text", "int", "float", "duration", "flag", "switch", "path", "texts"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `default` is what the command line would say; `choices` limits a text.

    A `duration` is seconds, or has a unit: 30m. A `switch` is a flag with a third state: not said. An
    environment variable holds several texts apart by `split`.
    """

    name: str
    default: Any
    kind: Kind
    sentence: str
    choices: tuple[str, ...] = ()
    variable: str = ""
    secret: bool = False
    metavar: str = ""
    split: str = r"[,\s]+"

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return self.variable or f"GATEWAY_{self.name.upper()}"


SETTINGS: tuple[Setting, ...] = (
    Setting("host", "127.0.0.1", "text", "Address of the public port; anything but loopback needs API keys."),
    Setting("port", 8000, "int", "Public port: the OpenAI API (0 = any free port)."),
    Setting("admin_host", "127.0.0.1", "text", "Address of the admin port; not loopback: needs --admin-key."),
    Setting("admin_port", 8001, "int", "Admin port: status page, /admin and /metrics (0 = any free port)."),
    Setting("admin_key", None, "text", "Bearer key that the admin port asks for.", secret=True),
    Setting("state_dir", "~/.gateway", "path", "Folder with replicas, costs, logs; one per gateway."),
    Setting(
        "provisioner",
        None,
        "text",
        "Where replicas come from (default: static with --replica, local without a FILE, else skypilot).",
        choices=("local", "static", "skypilot"),
    ),
    Setting(
        "replica",
        (),
        "texts",
        "URL of a server that already runs, for the static provisioner (repeatable).",
        variable="GATEWAY_REPLICAS",
        metavar="URL",
    ),
    Setting(
        "replica_api_key",
        None,
        "text",
        "API key the replicas ask for (default: one is made per service and passed as REPLICA_API_KEY).",
        secret=True,
    ),
    Setting(
        "replica_transport",
        None,
        "text",
        "How replicas are spoken to (default: skypilot tls if `run` uses $REPLICA_TLS_CERT, others plain).",
        choices=("tls", "plain"),
    ),
    Setting("replica_ca", None, "path", "PEM file to verify https:// replicas with.", metavar="FILE"),
    Setting(
        "api_key",
        (),
        "texts",
        "API key that clients send, with a name for logs (repeatable; at least 8 characters).",
        variable="GATEWAY_API_KEYS",
        secret=True,
        metavar="NAME=KEY",
    ),
    Setting(
        "api_keys_file", None, "path", "File with more of them, a NAME=KEY a line; SIGHUP reads it again.",
        metavar="FILE",
    ),
    Setting(
        "limits_file", None, "path", "File with lines like max-waiting=2000; SIGHUP reads it again.",
        metavar="FILE",
    ),
    Setting("insecure_open", False, "flag", "Serve other machines without any API key."),
    Setting("workers", 1, "int", "Worker processes on the public port."),
    Setting("log_level", "info", "text", "What is logged.", choices=("debug", "info", "warning", "error")),
    Setting("access_log", None, "text", "File for one JSON line per request (- = stderr).", metavar="FILE"),
    Setting("max_body", 33_554_432, "int", "Largest request body, bytes (32 MiB); more is 413."),
    Setting("max_waiting", 1000, "int", "Requests held at once over all workers; more is 429."),
    Setting("max_waiting_bytes", 1_073_741_824, "int", "Bytes of held bodies over all workers (1 GiB)."),
    Setting(
        "hold",
        "beats",
        "text",
        "How a request waits for a cold start: kept alive by beats, silently, or refused with an ETA.",
        choices=("beats", "silent", "reject"),
    ),
    Setting("hold_max", None, "float", "Longest hold (default: provision timeout + initial delay + 300 s)."),
    Setting("commit_after", 5.0, "float", "Silence before a held request is answered 200 and kept alive."),
    Setting("beat_every", 8.0, "float", "Seconds between beats to a waiting client."),
    Setting("beat_after", 45.0, "float", "Silence of a replica after which beats begin (0 = never)."),
    Setting("upstream_timeout", 1800.0, "float", "Longest silence of a replica within one request."),
    Setting("connect_timeout", 5.0, "float", "Longest dial to a replica."),
    Setting("write_timeout", 300.0, "float", "How long a client may read nothing before it is cut off."),
    Setting("drain_timeout", 30.0, "float", "Time that running answers get when the gateway stops."),
    Setting("drain_limit", 3600.0, "float", "Time that running answers get when a replica is taken out."),
    Setting("provision_timeout", 1200.0, "float", "Longest wait for a machine, also of a single attempt."),
    Setting("idle_timeout", None, "float", "Idle time before zero (default: max(1200, last cold start))."),
    Setting("target_in_flight", None, "float", "In-flight per replica to scale for (default: window)."),
    Setting("window_max", 64, "int", "Most requests given to one replica at a time."),
    Setting("min_replicas", None, "int", "Fewest replicas, instead of the YAML's figure."),
    Setting("max_replicas", None, "int", "Most replicas, instead of the YAML's figure."),
    Setting("model", None, "text", "Model name clients see (default: from the YAML's command)."),
    Setting(
        "plan",
        (),
        "texts",
        "Hardware to launch on, such as H100:8x2; the next when there is no capacity (repeatable).",
        variable="GATEWAY_PLANS",
        metavar="ACCELERATOR:COUNTxNODES",
    ),
    Setting("gpus", None, "text", "Accelerators per node, instead of the YAML's, such as H200:8."),
    Setting("num_nodes", None, "int", "Nodes per replica, instead of the YAML's."),
    Setting("use_spot", None, "switch", "Spot machines; --no-use-spot: on-demand (default: the YAML's)."),
    Setting("infra", None, "text", "Where to launch, such as aws/us-east-1 or k8s, instead of the YAML's."),
    Setting(
        "env",
        (),
        "texts",
        "Variable of every replica (repeatable); NAME alone takes the value from the environment.",
        metavar="NAME=VALUE",
        split=r"\n+",
    ),
    Setting(
        "secret",
        (),
        "texts",
        "Secret variable of every replica, its value taken from the environment (repeatable).",
        variable="GATEWAY_SECRETS",
        metavar="NAME",
    ),
    Setting("env_file", None, "path", "File with lines NAME=VALUE, secret variables too.", metavar="FILE"),
    Setting(
        "max_hourly_cost", None, "float", "Most dollars per hour; no launch passes it.", metavar="DOLLARS"
    ),
    Setting(
        "max_daily_cost",
        None,
        "float",
        "Dollars within 24 hours after which nothing more is launched; streams go on.",
        metavar="DOLLARS",
    ),
    Setting(
        "price",
        (),
        "texts",
        "Dollars per hour: of a node (H200:8=27.5) that the catalogue does not price, or of any replica (2).",
        metavar="[ACCELERATOR:COUNT=]DOLLARS",
    ),
    Setting("probe_interval", None, "float", "Seconds between readiness probes (default: the YAML's)."),
    Setting("upscale_delay", None, "float", "Sustained demand before scaling up (default: the YAML's)."),
    Setting(
        "keep_failed",
        0.0,
        "duration",
        "How long a machine that failed is held, billed, for a look at it, such as 30m.",
        metavar="DURATION",
    ),
    Setting(
        "dead_man",
        7200.0,
        "duration",
        "How long a cloud replica outlives a dead gateway before it ends itself; at least a cold start.",
        metavar="DURATION",
    ),
    Setting("downscale_delay", None, "float", "Sustained quiet before scaling down (default: the YAML's)."),
)
