"""`python -m replicas.simulator`: the simulator as a process, with SGLang's flags as far as they matter
here.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Callable

from .config import SimConfig
from .faults import KINDS, FaultError, Faults
from .profiles import PROFILES
from .server import Simulator
from .startup import DEFAULT_SECONDS, DiedAtStart, Startup, StartupError, parse_phases, printer, stamp


def _positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a number above 0")
    return number


def parser() -> argparse.ArgumentParser:
    """The flags: SGLang's own first, then the simulator's."""
    faults = "\n".join(f"  {kind:22} {text}" for kind, text in KINDS.items())
    flags = argparse.ArgumentParser(
        prog="python -m replicas.simulator",
        description="An engine shaped like SGLang 0.5.23 on its HTTP port. "
        "Any other flag of SGLang is accepted and ignored.",
        epilog=f"faults (KIND or KIND=NUMBER):\n{faults}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = SimConfig()
    sglang = flags.add_argument_group("as SGLang's")
    sglang.add_argument("--host", default=default.host)
    sglang.add_argument("--port", type=int, default=30000)
    sglang.add_argument("--model-path", "--model", default=default.model_path)
    sglang.add_argument("--served-model-name")
    sglang.add_argument("--api-key")
    sglang.add_argument("--ssl-keyfile", metavar="FILE", help="PEM; with --ssl-certfile: https")
    sglang.add_argument("--ssl-certfile", metavar="FILE")
    sglang.add_argument("--max-running-requests", type=int, default=default.max_running)
    sglang.add_argument("--max-queued-requests", type=int)
    sglang.add_argument(
        "--max-total-tokens", type=int, help="room in the KV cache, tokens (default: the profile's)"
    )
    sglang.add_argument("--context-length", type=int, default=default.context_length)
    sglang.add_argument("--reasoning-parser")
    sglang.add_argument("--stream-interval", type=int, default=default.stream_interval)
    sglang.add_argument("--enable-metrics", action="store_true")
    sglang.add_argument("--decode-log-interval", type=int, default=default.decode_log_interval)
    sglang.add_argument("--load-snapshot-publish-interval", type=int, default=default.publish_interval)
    sglang.add_argument("--skip-server-warmup", action="store_true")
    sglang.add_argument("--random-seed", "--seed", dest="seed", type=int, default=default.seed)
    sglang.add_argument("--log-level", default="info")
    own = flags.add_argument_group("of the simulator")
    own.add_argument(
        "--profile",
        choices=sorted(PROFILES),
        default="r1-8xh200-2026",
        help="whose latency (engines as measured)",
    )
    own.add_argument("--speedup", type=_positive, default=1.0, help="how many times faster than the profile")
    own.add_argument(
        "--jitter", type=float, default=default.jitter, help="random share of each step's length, 0..1"
    )
    own.add_argument(
        "--startup",
        default=None,
        help="seconds of each phase: provision=2,setup=0,download=3,load=2,warmup=1",
    )
    own.add_argument("--reply", help="what it says to everything")
    own.add_argument(
        "--fault", action="append", default=[], metavar="KIND[=NUMBER]", help="see below; repeatable"
    )
    own.add_argument("--journal", metavar="FILE", help="notes each run and its first byte there (stats.py)")
    own.add_argument(
        "--exit-code", type=int, help="of a crash (default: dies by SIGKILL) or a death at load (default: 1)"
    )
    own.add_argument(
        "--crash-silence", type=float, default=default.crash_silence, help="seconds between crash and EOF"
    )
    own.add_argument(
        "--health-seconds", type=float, default=default.health_seconds, help="what /health takes when well"
    )
    own.add_argument("--health-timeout", type=float, default=default.health_timeout, help="... and when hung")
    own.add_argument(
        "--keep-alive", type=float, default=default.keep_alive, help="seconds an idle connection is kept"
    )
    own.add_argument(
        "--disconnect-poll",
        type=float,
        default=default.disconnect_poll,
        help="looks for a queued client so often",
    )
    own.add_argument(
        "--drain-tick", type=float, help="after SIGTERM (default: 5, or 0.2 with --speedup above 1)"
    )
    return flags


def config_of(options: argparse.Namespace) -> SimConfig:
    """The settings that the flags mean."""
    return SimConfig(
        host=options.host,
        port=options.port,
        model_path=options.model_path,
        served_model_name=options.served_model_name,
        api_key=options.api_key,
        ssl_keyfile=options.ssl_keyfile,
        ssl_certfile=options.ssl_certfile,
        max_running=options.max_running_requests,
        max_queued=options.max_queued_requests,
        kv_tokens=options.max_total_tokens,
        context_length=options.context_length,
        profile=options.profile,
        speedup=options.speedup,
        jitter=options.jitter,
        seed=options.seed,
        reply=options.reply,
        reasoning_parser=options.reasoning_parser,
        stream_interval=options.stream_interval,
        enable_metrics=options.enable_metrics,
        decode_log_interval=options.decode_log_interval,
        publish_interval=options.load_snapshot_publish_interval,
        keep_alive=options.keep_alive,
        health_seconds=options.health_seconds,
        health_timeout=options.health_timeout,
        disconnect_poll=options.disconnect_poll,
        crash_silence=options.crash_silence,
        drain_tick=options.drain_tick or (0.2 if options.speedup > 1 else 5.0),
        faults=tuple(options.fault),
        journal=options.journal,
        exit_code=options.exit_code,
    )


async def serve(config: SimConfig, phases: dict[str, float], *, quiet: bool) -> int:
    """Start up, serve until SIGTERM or SIGINT; returns the exit code."""
    log = (lambda line: None) if quiet else (lambda line: printer(stamp(line)))
    sim = Simulator(config, log=log, dies=True)
    startup = Startup(config, phases, sim.faults, say=printer)
    try:
        await startup.before_port()
        await sim.open(starting=True)
        draining: list[asyncio.Task[None]] = []

        def stop() -> None:
            if not draining:
                draining.append(asyncio.ensure_future(sim.drain()))

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        warmup, closed = (
            asyncio.ensure_future(part) for part in (startup.warmup(sim.url, sim.ready), sim.closed.wait())
        )
        await asyncio.wait((warmup, closed), return_when=asyncio.FIRST_COMPLETED)
        if closed.done():
            warmup.cancel()
            return 0
        await warmup
    except DiedAtStart:
        await sim.close()
        return 1 if config.exit_code is None else config.exit_code
    await sim.closed.wait()
    return 0


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where there is one (not on Windows)."""
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def main(arguments: list[str] | None = None) -> int:
    """Parse the flags and serve."""
    flags = parser()
    options, unknown = flags.parse_known_args(arguments)
    try:
        phases = dict(DEFAULT_SECONDS) if options.startup is None else parse_phases(options.startup)
        config = config_of(options)
        Faults.parse(config.faults)
    except (StartupError, FaultError) as error:
        flags.error(str(error))
    if unknown:
        printer(f"simulator: ignored: {' '.join(unknown)}")
    if options.skip_server_warmup:
        phases["warmup"] = 0.0
    quiet = options.log_level.lower() in ("warning", "error", "critical")
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(serve(config, phases, quiet=quiet))
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        printer(f"simulator: {error}")
        return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
