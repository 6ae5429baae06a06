"""The OpenAI surface as data: one row per endpoint, and the bodies, frames and beats that go with it. PURE.

An allow-list, not a wildcard: what is not in `ENDPOINTS` is 404, so no admin path of a replica is reachable
with the replica's key. What clients tolerate while they wait was measured with openai-python 1.109 to 3.54,
openai-node 6.49, the AI SDK and LangChain: SSE comments end in a *single* newline (a comment block of its own
is dispatched as an empty event by some), no `id:`, `retry:` or `event:` line is ever sent where OpenAI's own
stream has none, and a JSON answer may begin with spaces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from gateway.errors import GatewayError, NotTaken, Refused, UpstreamError

Body = Mapping[str, Any]


class Beats(Enum):
    """Which bytes keep a waiting streaming client."""

    CHUNKS = "chunks"  # comments, and an empty chunk every 55 s: LangChain's timer counts parsed chunks only
    COMMENTS = "comments"
    PING = "ping"  # Anthropic's own `event: ping`


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One allowed POST path.

    `required`: of each group at least one member must be there. `streams`: knows `stream: true`. `rid`: the
    member that holds the prompt where SGLang takes our `rid` for a single prompt, else None. `end`: the line
    without which a stream was cut (at the start of a line: an answer may speak of `data: [DONE]`).
    `long_end`: the event of that line may be larger than the tail that is kept. `chunk`: the object name of
    an empty chunk. `arrays`: members that must be non-empty arrays where they are there.
    """

    path: str
    required: tuple[tuple[str, ...], ...] = ()
    streams: bool = False
    beats: Beats = Beats.COMMENTS
    prompt: str | None = None
    end: re.Pattern[bytes] = re.compile(rb"data:(?<![^\r\n]data:) ?\[DONE\](?:[\r\n]|$)")
    long_end: bool = False
    chunk: str | None = None
    anthropic: bool = False
    typed_errors: bool = False
    arrays: tuple[str, ...] = ()

    @property
    def target(self) -> bytes:
        """The path as it goes on the wire."""
        return self.path.encode()


_ROWS = (
    Endpoint(
        "/v1/chat/completions",
        (("messages",),),
        True,
        Beats.CHUNKS,
        "messages",
        chunk="chat.completion.chunk",
        arrays=("messages",),
    ),
    Endpoint("/v1/completions", (("prompt",),), True, Beats.CHUNKS, "prompt", chunk="text_completion"),
    Endpoint("/v1/embeddings", (("input",),)),
    Endpoint(
        "/v1/responses",
        (("input",),),
        True,
        end=re.compile(rb"event:(?<![^\r\n]event:) ?response\.(?:completed|incomplete|failed)[\r\n]"),
        long_end=True,
        typed_errors=True,
    ),
    Endpoint(
        "/v1/messages",
        (("messages",), ("max_tokens",)),
        True,
        Beats.PING,
        end=re.compile(rb"event:(?<![^\r\n]event:) ?message_stop[\r\n]"),
        anthropic=True,
        arrays=("messages",),
    ),
    Endpoint("/v1/rerank", (("query",), ("documents",)), arrays=("documents",)),
    Endpoint("/v1/score", (("query", "text_1"), ("items", "text_2"))),
    Endpoint(
        "/generate",
        (("text", "input_ids", "input_embeds"),),
        True,
        prompt="text",
        arrays=("input_ids",),
    ),
    Endpoint("/tokenize", (("prompt", "text", "messages"),), arrays=("messages",)),
    Endpoint("/detokenize", (("tokens",),)),
)
ENDPOINTS: Mapping[bytes, Endpoint] = {row.path.encode(): row for row in _ROWS}


# --- errors ---------------------------------------------------------------------------------------

_PATHS = re.compile(
    r'(?:,?\s*(?:in\s+)?File\s+"[^"]*",\s*line\s+\d+(?:,\s*in\s+[\w<>.]+)?)|(?<![\w/])(?:/[\w.@+-]+){2,}'
)


def scrub(message: str) -> str:
    """A replica's message without its file paths (SGLang's pydantic dumps carry them)."""
    return " ".join(_PATHS.sub("", message).split())[:2000]


def error_object(error: GatewayError) -> dict[str, Any]:
    """The `error` member of OpenAI's error shape."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def error_body(error: GatewayError, endpoint: Endpoint | None = None) -> bytes:
    """The JSON body of an error answer; Anthropic's clients want a `type` beside it."""
    body: dict[str, Any] = {"error": error_object(error)}
    if endpoint is not None and endpoint.anthropic:
        body = {"type": "error", **body}
    return _encoded(body)


def _encoded(value: object) -> bytes:
    # An unpaired surrogate ("\\ud800" is legal JSON) has no UTF-8: it goes out as it came in, escaped.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace")


def error_frame(error: GatewayError, endpoint: Endpoint) -> bytes:
    """The event that tells a streaming client, after 200 was sent, that this stream failed.

    Measured: `data: {"error": ...}` raises APIError with code and type in openai-python and openai-node,
    while a clean end without it is taken as success by both.
    """
    if endpoint.typed_errors:
        frame = {
            "type": "error",
            "code": error.code,
            "message": error.message,
            "param": error.param,
            "sequence_number": 0,
        }
        return b"event: error\ndata: %b\n\n" % _encoded(frame)
    event = b"event: error\n" if endpoint.anthropic else b""
    return b"%bdata: %b\n\n" % (event, error_body(error, endpoint))


def refused(status: int, raw: bytes) -> UpstreamError:
    """A replica's own error answer, re-wrapped: SGLang's are flat, leak paths, and come in five shapes."""
    message, param, code = _read_error(raw)
    if status in (401, 403):
        # The client's key was checked by us; this is about ours.
        return Refused(
            "The replica refused the gateway's key: start it with --api-key $REPLICA_API_KEY, or tell the "
            "gateway its key with --replica-api-key.",
            status=502,
            code="replica_unauthorized",
        )
    if status == 503:
        return NotTaken(message or "The replica cannot take the request now.")
    if status < 400:
        return Refused(f"The replica answered {status}, which no client of ours can use.", status=502)
    kind = "invalid_request_error" if status < 500 else "server_error"
    error_code = code or ("invalid_request" if status < 500 else "replica_error")
    return Refused(
        message or f"The replica answered {status}.", status=status, type=kind, param=param, code=error_code
    )


def _read_error(raw: bytes) -> tuple[str, str | None, str | None]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        return scrub(raw.decode("utf-8", "replace")), None, None
    if isinstance(body, dict):
        inner = body.get("error", body)
        if isinstance(inner, str):
            return scrub(inner), None, None
        if isinstance(inner, dict):
            message = inner.get("message") or inner.get("detail") or ""
            param, code = inner.get("param"), inner.get("code")
            named = code if isinstance(code, str) and not code.isdigit() else None
            return (
                scrub(message if isinstance(message, str) else json.dumps(message)),
                param if isinstance(param, str) else None,
                named,
            )
    return scrub(json.dumps(body)), None, None


# --- streams --------------------------------------------------------------------------------------

FIRST_EVENT_LIMIT = 64 * 1024  # bytes buffered while looking for the first event's blank line
_BLANK = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n|\r\n\n")


def first_event_end(data: bytes) -> int:
    """Where the first event's blank line ends, or -1: not all of it is here yet."""
    match = _BLANK.search(data)
    return match.end() if match else -1


def first_event_error(event: bytes) -> UpstreamError | None:
    """SGLang says "queue full" of a stream as 200 with an error event first; None when the first event is not
    an error. What comes after its blank line (`data: [DONE]`, mostly in the same read) is not looked at."""
    if b'"error"' not in event:
        return None
    end = first_event_end(event)
    lines = re.split(rb"\r\n|\n|\r", event[:end] if end >= 0 else event)
    lines = [line[5:].strip() for line in lines if line.startswith(b"data:")]
    try:
        body = json.loads(b"\n".join(lines))
    except ValueError:
        return None
    inner = body.get("error") if isinstance(body, dict) else None
    if not isinstance(inner, dict | str) or not inner:
        return None
    code = inner.get("code") if isinstance(inner, dict) else None
    status = code if isinstance(code, int) and 400 <= code <= 599 else 502
    return refused(status, json.dumps(body).encode())


def between_events(tail: bytes) -> bool:
    """Whether a stream whose last relayed bytes are `tail` stands between two events."""
    return not tail or tail.endswith((b"\n\n", b"\n\r\n", b"\r\r"))


def is_complete(tail: bytes, endpoint: Endpoint) -> bool:
    """Whether the stream's end marker is among its last bytes."""
    # Each pattern begins with its literal, and looks back from there for the start of the line: the other way
    # round there is nothing to search for quickly, and 4 KiB take 55 us instead of 2.
    return endpoint.end.search(tail) is not None


# No more digits than a counter takes: a replica may say anything.
_TOKENS_IN = re.compile(rb'"(?:prompt|input)_tokens":\s*(\d{1,12})\b')
_TOKENS_OUT = re.compile(rb'"(?:completion|output)_tokens":\s*(\d{1,12})\b')


def usage(tail: bytes) -> tuple[int | None, int | None]:
    """(prompt tokens, completion tokens) as the last bytes of a reply state them, without parsing all of
    it."""
    at = tail.rfind(b'"usage":')
    if at < 0:
        return None, None
    came, went = _TOKENS_IN.search(tail, at), _TOKENS_OUT.search(tail, at)
    return (int(came[1]) if came else None), (int(went[1]) if went else None)


# --- beats ----------------------------------------------------------------------------------------


def comment(text: str) -> bytes:
    """An SSE comment: one line, one newline, nothing that could end it early."""
    return b": %b\n" % " ".join(text.split()).encode("utf-8", "replace")


PING = b'event: ping\ndata: {"type": "ping"}\n\n'
SPACE = b" "  # what keeps the client of a JSON answer: whitespace before the value is JSON


def empty_chunk(endpoint: Endpoint, request_id: str, model: str, created: int) -> bytes:
    """A data chunk without content, for clients whose timer counts parsed chunks (LangChain: 120 s)."""
    choice: dict[str, Any] = {"index": 0, "delta": {}, "finish_reason": None}
    if endpoint.chunk == "text_completion":
        choice = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}
    body = {
        "id": request_id,
        "object": endpoint.chunk,
        "created": created,
        "model": model,
        "choices": [choice],
    }
    return b"data: %b\n\n" % _encoded(body)
