"""Which path says what. Everything but the generating endpoints is answered here."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote

from . import info, shapes
from .asking import NO_LABELS, NOT_AN_EMBEDDER
from .connection import Exchange
from .faults import FaultError
from .invalid import Refused, invalid, missing, read_object, wrong_value
from .reply import text_of, token_ids

if TYPE_CHECKING:
    from .server import Simulator

OPEN_WITHOUT_KEY = ("/health", "/metrics", "/ready", "/sim/")
FLUSHED = (
    b"Cache flushed.\nPlease check backend logs for more details. "
    b"(When there are running or waiting requests, the operation will not be performed.)\n"
)


def route(sim: Simulator, exchange: Exchange) -> None:
    """Answer `exchange`, or hand it to the engine. Raises Refused."""
    path = exchange.path
    if exchange.method == "OPTIONS" and "access-control-request-method" in exchange.headers:
        _options(sim, exchange)
        return
    key = sim.config.api_key
    if key is not None and not path.startswith(OPEN_WITHOUT_KEY):
        given = exchange.headers.get("authorization", "")
        if given.encode("latin-1") != b"Bearer " + key.encode():
            exchange.respond(401, shapes.compact({"error": "Unauthorized"}), vary=False)
            return
    if path == "/metrics/":
        path = "/metrics"
    methods = ROUTES.get(path)
    if methods is None and path.startswith("/v1/models/"):
        methods = {"GET": _model}
    if methods is None or (path == "/metrics" and not sim.config.enable_metrics):
        exchange.respond(404, shapes.compact({"detail": "Not Found"}))
        return
    answer = methods.get(exchange.method)
    if answer is None:
        allow = b"allow: " + ", ".join(methods).encode() + b"\r\n"
        exchange.respond(405, shapes.compact({"detail": "Method Not Allowed"}), extra=allow)
        return
    answer(sim, exchange)


def _options(sim: Simulator, exchange: Exchange) -> None:
    origin = exchange.headers.get("origin", "*").encode("latin-1")
    extra = (
        b"vary: Origin, Access-Control-Request-Method, Access-Control-Request-Headers, "
        b"Access-Control-Request-Private-Network\r\n"
        b"access-control-allow-methods: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, QUERY\r\n"
        b"access-control-max-age: 600\r\naccess-control-allow-credentials: true\r\n"
        b"access-control-allow-origin: " + origin + b"\r\n"
    )
    exchange.respond(200, b"OK", b"text/plain; charset=utf-8", extra, vary=False)


def _health(sim: Simulator, exchange: Exchange) -> None:
    """Asks the engine for a token and looks each second whether *anything* came out of it; 20 s without:
    503.
    """
    if sim.starting or sim.draining or sim.faults.unhealthy:
        exchange.respond(503, content_type=None)
        return
    began = time.monotonic()

    def look() -> None:
        if exchange.connection.current is not exchange or sim.silent:
            return  # the client has left
        if not sim.hung:
            exchange.respond(200, content_type=None)
        elif time.monotonic() - began >= sim.config.health_timeout - 0.001:
            exchange.respond(503, content_type=None)
        else:
            sim.later(min(sim.config.health_seconds, sim.config.health_timeout), look)

    sim.later(sim.config.health_seconds, look)


def _ready(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(503 if sim.starting or sim.draining else 200, content_type=None)


def _models(sim: Simulator, exchange: Exchange) -> None:
    card = shapes.model_card(sim.config.name, int(time.time()), sim.config.context_length)
    exchange.respond(200, shapes.compact({"object": "list", "data": [card]}))


def _model(sim: Simulator, exchange: Exchange) -> None:
    name = unquote(exchange.path.removeprefix("/v1/models/"))
    if name != sim.config.name:
        exchange.respond(404, shapes.unknown_model(name))
        return
    exchange.respond(
        200, shapes.compact(shapes.model_card(name, int(time.time()), sim.config.context_length))
    )


def _loads(sim: Simulator, exchange: Exchange) -> None:
    include = parse_qs(exchange.query).get("include", ["all"])
    exchange.respond(200, shapes.compact(sim.reports.loads(core=include == ["core"], hung=sim.hung)))


def _metrics(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(200, sim.reports.metrics(), b"text/plain; version=0.0.4; charset=utf-8")


def _server_info(sim: Simulator, exchange: Exchange) -> None:
    status = "starting" if sim.starting else "ready"
    exchange.respond(200, shapes.compact(info.server_info(sim.config, sim.engine, status)))


def _model_info(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(200, shapes.compact(info.model_info(sim.config)))


def _abort(sim: Simulator, exchange: Exchange) -> None:
    data = _body(exchange)
    rid = data.get("rid")
    if data.get("abort_all"):
        sim.stats.abort_calls.append("*")
        sim.serving.abort(None)
    elif isinstance(rid, str) and rid:
        sim.stats.abort_calls.append(rid)
        sim.serving.abort(rid)
    exchange.respond(200, content_type=None)


def _flush(sim: Simulator, exchange: Exchange) -> None:
    if sim.serving.live:
        exchange.respond(400, b"Flush cache failed.\n", content_type=None)
    else:
        exchange.respond(200, FLUSHED, content_type=None)


def _embeddings(sim: Simulator, exchange: Exchange) -> None:
    raise Refused(400, shapes.flat_error(NOT_AN_EMBEDDER))


def _score(sim: Simulator, exchange: Exchange) -> None:
    if not _body(exchange).get("label_token_ids"):
        raise Refused(400, shapes.flat_error(NO_LABELS))
    raise Refused(400, shapes.flat_error("The simulator has no probabilities to score with."))


def _tokenize(sim: Simulator, exchange: Exchange) -> None:
    data = _body(exchange)
    texts = data.get("prompt")
    if (texts is None) == (data.get("messages") is None):
        wrong = "Exactly one of 'prompt' or 'messages' must be provided."
        raise invalid("/tokenize", wrong_value(wrong, data))
    if texts is None:
        texts = json.dumps(data["messages"])
    found = [token_ids(str(text)) for text in (texts if isinstance(texts, list) else [texts])]
    counts = [len(ids) for ids in found]
    several = isinstance(texts, list)
    answer = {"tokens": found if several else found[0], "count": counts if several else counts[0]}
    exchange.respond(200, shapes.compact({**answer, "max_model_len": sim.config.context_length}))


def _detokenize(sim: Simulator, exchange: Exchange) -> None:
    data = _body(exchange)
    if "tokens" not in data:
        raise invalid("/detokenize", missing(data, "tokens"))
    exchange.respond(200, shapes.compact({"text": text_of(data["tokens"])}))


def _body(exchange: Exchange) -> dict[str, Any]:
    return read_object(exchange.path, exchange.headers.get("content-type", ""), bytes(exchange.body))


def _sim_stats(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(200, shapes.compact(sim.stats.to_json()))


def _sim_fault(sim: Simulator, exchange: Exchange) -> None:
    data = _object(exchange)
    kind, count, silence = data.get("kind"), data.get("count"), data.get("silence")
    if not isinstance(kind, str):
        raise Refused(
            400, shapes.compact({"detail": 'wanted: {"kind": ..., "count": number, "silence": seconds}'})
        )
    try:
        sim.faults.set(kind, count)
    except FaultError as error:
        raise Refused(400, shapes.compact({"detail": str(error)})) from None
    exchange.respond(200, shapes.compact({"ok": kind}))
    sim.inject(kind, count, silence, spare=exchange.connection)


def _object(exchange: Exchange) -> dict[str, Any]:
    try:
        data = json.loads(exchange.body)
    except ValueError:
        data = None
    if not isinstance(data, dict):
        raise Refused(400, shapes.flat_error("1 validation error:\n  JSON object expected", "Bad Request"))
    return data


def _generate(sim: Simulator, exchange: Exchange) -> None:
    sim.serving.generate(exchange)


def _empty(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(200, content_type=None)


def _root(sim: Simulator, exchange: Exchange) -> None:
    exchange.respond(200, b'"SGLang is running"')


ROUTES: dict[str, dict[str, Callable[[Simulator, Exchange], None]]] = {
    "/": {"GET": _root},
    "/health": {"GET": _health},
    "/health_generate": {"GET": _health},
    "/ready": {"GET": _ready},
    "/ping": {"GET": _empty},
    "/v1/models": {"GET": _models},
    "/v1/loads": {"GET": _loads},
    "/metrics": {"GET": _metrics},
    "/server_info": {"GET": _server_info},
    "/get_server_info": {"GET": _server_info},
    "/model_info": {"GET": _model_info},
    "/get_model_info": {"GET": _model_info},
    "/abort_request": {"POST": _abort},
    "/flush_cache": {"GET": _flush, "POST": _flush},
    "/v1/chat/completions": {"POST": _generate},
    "/v1/completions": {"POST": _generate},
    "/generate": {"POST": _generate, "PUT": _generate},
    "/v1/messages": {"POST": _generate},
    "/v1/responses": {"POST": _generate},
    "/v1/embeddings": {"POST": _embeddings},
    "/v1/rerank": {"POST": _embeddings, "PUT": _embeddings},
    "/v1/score": {"POST": _score},
    "/tokenize": {"POST": _tokenize},
    "/v1/tokenize": {"POST": _tokenize},
    "/detokenize": {"POST": _detokenize},
    "/v1/detokenize": {"POST": _detokenize},
    "/sim/stats": {"GET": _sim_stats},
    "/sim/fault": {"POST": _sim_fault},
}
