"""What SGLang answers to a list of requests, reduced to what a client can rely on.

`REQUESTS` are sent to a real SGLang and to the simulator; `canonical` of the answer must be what
`tests/data/sglang/contract.json` has for it, which is a real SGLang's:

    python -m tests.sglang.contract PORT [API_KEY]     writes that file anew from the engine on that port
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.wire import Response, exchange, fetch, request_bytes

GOLDEN = Path(__file__).parents[1] / "data" / "sglang" / "contract.json"
NAMES = GOLDEN.with_name("names.json")
CONTEXT = 2048  # tokens, of the tiny model

# Members whose values a client reads; of all others only the type counts.
LITERAL = {
    *("object", "type", "role", "status", "phase", "stop_reason", "finish_reason", "index"),
    *("output_index", "content_index", "code", "param", "message", "detail", "error"),
    *("model", "id", "item_id", "root", "parent", "owned_by", "version"),
    *("max_model_len", "max_output_tokens", "max_running_requests", "max_total_num_tokens", "dp_rank"),
    *("is_generation", "weight_version", "tool_choice", "truncation", "reason"),
}
VARYING = {"date": "<date>", "content-length": "<n>"}


@dataclass(frozen=True)
class Request:
    """One request. `key`: what is sent as the API key ("right" is the engine's own)."""

    name: str
    method: str
    path: str
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    key: str | None = "right"
    unordered: bool = False  # several choices: their events come as they come


CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello the world"}]
BROWSER = {"origin": "http://a.example"}
USAGE = {"include_usage": True}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def chat(name: str, *, unordered: bool = False, without: str = "", **more: Any) -> Request:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "temperature": 0, **more}
    body = {key: value for key, value in body.items() if key != without and value != "-"}
    return Request(f"chat {name}", "POST", CHAT, body, unordered=unordered)


def post(name: str, path: str, **body: Any) -> Request:
    return Request(name, "POST", path, body)


def get(path: str, **more: Any) -> Request:
    return Request(f"GET {path}", "GET", path, **more)


REQUESTS = (
    *(get(path) for path in ("/health", "/health_generate", "/ready", "/ping", "/", "/v1/models")),
    *(get(f"/v1/models/{name}") for name in ("tiny", "nope")),
    *(get(path) for path in ("/v1/loads", "/v1/loads?include=core", "/model_info", "/get_model_info")),
    *(get(path) for path in ("/get_load", "/nope", CHAT, "/v1/completions", "/generate")),
    Request("HEAD /health", "HEAD", "/health"),
    Request("DELETE /v1/models", "DELETE", "/v1/models"),
    Request("OPTIONS", "OPTIONS", CHAT, headers=BROWSER),
    Request("preflight", "OPTIONS", CHAT, headers={**BROWSER, "access_control_request_method": "POST"}),
    Request("GET by a browser", "GET", "/ping", headers=BROWSER),
    # keys
    *(get(path, key=None) for path in ("/v1/models/tiny?", "/v1/loads?", "/?", "/server_info?", "/nope?")),
    *(get(path, key=None) for path in ("/health?", "/ready?")),
    Request("no key", "POST", CHAT, {"model": "tiny", "messages": MESSAGES}, key=None),
    Request("wrong key", "POST", CHAT, {"model": "tiny", "messages": MESSAGES}, key="wrong"),
    Request("x-api-key", "POST", CHAT, b"{}", headers={"x_api_key": "wrong"}, key=None),
    # administration
    post("abort of nobody", "/abort_request", rid="no-such"),
    post("abort of all", "/abort_request", abort_all=True),
    Request("abort, bad JSON", "POST", "/abort_request", b"{"),
    Request("flush", "POST", "/flush_cache"),
    # chat
    chat("plain"),
    chat("to its end", max_tokens="-"),
    chat("ignore_eos", ignore_eos=True, max_tokens=40),
    chat("max_completion_tokens", max_completion_tokens=3),
    chat("one token", max_tokens=1),
    chat("rid", rid="my-rid"),
    chat("n", n=2),
    chat("stop", max_tokens=4, stop=["zzzz"]),
    chat("unknown model", model="nope"),
    chat("no model", without="model"),
    chat("unknown member", no_such_member=1),
    chat("text parts", messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
    chat("all roles", messages=[{"role": r, "content": "x"} for r in ("system", "assistant", "user")]),
    chat("role in capitals", messages=[{"role": "USER", "content": "x"}]),
    chat("null content", messages=[{"role": "assistant", "content": None}, *MESSAGES]),
    chat("tools", tools=[TOOL]),
    chat("logprobs", logprobs=True, top_logprobs=2),
    chat("stream", stream=True),
    chat("stream to its end", stream=True, max_tokens="-", stream_options=USAGE),
    chat("stream usage", stream=True, stream_options=USAGE),
    chat("stream usage in all", stream=True, stream_options={**USAGE, "continuous_usage_stats": True}),
    chat("stream rid", stream=True, rid="my-rid"),
    chat("stream n", stream=True, n=2, stream_options=USAGE, unordered=True),
    chat("stream one token", stream=True, max_tokens=1),
    chat("stream unknown model", stream=True, model="nope"),
    chat("stream logprobs", stream=True, logprobs=True, top_logprobs=2),
    # chat, refused
    Request("bad JSON", "POST", CHAT, b'{"model": "tiny", "messages": ['),
    Request("bad JSON inside", "POST", CHAT, b'{"model": tiny}'),
    Request("no body", "POST", CHAT, b"", headers={"content_type": "application/json"}),
    Request("an array", "POST", CHAT, b"[1,2]"),
    Request("a number", "POST", CHAT, b"1"),
    Request("no content type", "POST", CHAT, b"{}", headers={"content_type": ""}),
    Request("text", "POST", CHAT, b"{}", headers={"content_type": "text/plain"}),
    chat("no messages", without="messages"),
    chat("empty messages", messages=[]),
    chat("messages is a text", messages="hello"),
    chat("bad role", messages=[{"role": "robot", "content": "x"}]),
    chat("no role", messages=[{"content": "x"}]),
    chat("temperature", temperature=-3),
    chat("top_p", top_p=2),
    chat("max_tokens < 0", max_tokens=-1),
    chat("max_tokens is a text", max_tokens="many"),
    chat("max_tokens too big", max_tokens=100_000),
    chat("n=0", n=0),
    chat("an image", messages=[{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]),
    chat("too long", messages=[{"role": "user", "content": "x?" * 5000}]),
    chat("stream too long", messages=[{"role": "user", "content": "x?" * 5000}], stream=True),
    chat("stream temperature", temperature=-3, stream=True),
    chat("tool_choice without tools", tool_choice={"type": "function", "function": {"name": "x"}}),
    # the other endpoints
    post("completions", "/v1/completions", model="tiny", prompt="hello", max_tokens=4),
    post("completions stream", "/v1/completions", model="tiny", prompt="hello", max_tokens=4, stream=True),
    post("completions usage", "/v1/completions", prompt="a", max_tokens=4, stream=True, stream_options=USAGE),
    post("completions ids", "/v1/completions", model="tiny", prompt=[40, 41], max_tokens=4),
    post("completions two", "/v1/completions", model="tiny", prompt=["hello", "world"], max_tokens=4),
    post("completions no prompt", "/v1/completions", model="tiny"),
    post("generate", "/generate", text="hello", sampling_params={"max_new_tokens": 4}),
    post("generate ids", "/generate", input_ids=[40, 41], sampling_params={"max_new_tokens": 4}),
    post("generate stream", "/generate", text="hello", sampling_params={"max_new_tokens": 4}, stream=True),
    post("generate nothing", "/generate", sampling_params={"max_new_tokens": 4}),
    post("tokenize", "/tokenize", model="tiny", prompt="hello the world"),
    post("tokenize two", "/tokenize", model="tiny", prompt=["hello", "the"]),
    post("tokenize nothing", "/tokenize", model="tiny"),
    post("v1 tokenize", "/v1/tokenize", model="tiny", prompt="hello the world"),
    post("detokenize", "/detokenize", model="tiny", tokens=[40, 41, 42]),
    post("detokenize nothing", "/detokenize", model="tiny"),
    post("messages", "/v1/messages", model="tiny", messages=MESSAGES, max_tokens=4),
    post("messages to its end", "/v1/messages", model="tiny", messages=MESSAGES, max_tokens=400),
    post("messages stream", "/v1/messages", model="tiny", messages=MESSAGES, max_tokens=4, stream=True),
    post("messages no limit", "/v1/messages", model="tiny", messages=MESSAGES),
    post("responses", "/v1/responses", model="tiny", input="hello", max_output_tokens=8),
    post("responses stream", "/v1/responses", model="tiny", input="hello", max_output_tokens=8, stream=True),
    post("responses no input", "/v1/responses", model="tiny"),
    post("embeddings", "/v1/embeddings", model="tiny", input="x"),
    post("rerank", "/v1/rerank", model="tiny", query="a", documents=["b", "c"]),
    post("score nothing", "/v1/score", model="tiny"),
)


async def send(
    port: int, request: Request, key: str, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> Response:
    """Send it to the engine there, whose API key is `key`."""
    headers = dict(request.headers)
    if request.key is not None:
        headers["authorization"] = f"Bearer {key if request.key == 'right' else request.key}"
    data = request_bytes(request.method, request.path, request.body, **headers)
    return await exchange(port, data, host=host, tls=tls)


def canonical(request: Request, answer: Response) -> Any:
    """Status, headers and body, without what depends on the model, the machine or the moment."""
    shape: dict[str, Any] = {
        "status": answer.status,
        "headers": [header(name, value) for name, value in answer.headers],
    }
    kind = dict(answer.headers).get("content-type", "")
    if kind.startswith("text/event-stream"):
        assert answer.raw.endswith(b"\r\n0\r\n\r\n"), "the last chunk is missing"
        shape["events"] = distinct([event(chunk) for chunk in answer.chunks[:-1]])
        if request.unordered:
            shape["events"].sort()
    elif kind == "application/json" and answer.rest:
        shape["json"] = skeleton(answer.json)
        shape["compact"] = is_compact(answer.rest)
    else:
        shape["text"] = answer.rest.decode()
    return shape


def header(name: str, value: str) -> str:
    """One header line; the order of the methods in `allow` changes from one process to the next."""
    if name == "allow":
        value = ", ".join(sorted(value.split(", ")))
    return f"{name}: {VARYING.get(name, value)}"


def event(chunk: bytes) -> str:
    """One HTTP chunk, which is one whole server-sent event."""
    text = chunk.decode()
    assert text.endswith("\n\n"), f"not a whole event: {text!r}"
    *names, data = text.removesuffix("\n\n").split("\n")
    assert data.startswith("data: "), f"not an event: {text!r}"
    payload = data.removeprefix("data: ")
    if payload.startswith("{"):
        spacing = "" if is_compact(payload.encode()) else " (spaces)"
        payload = json.dumps(skeleton(json.loads(payload))) + spacing
    return "\n".join([*names, payload])


def distinct(events: list[str]) -> list[str]:
    """Each once, in the order in which they first came: how many tokens an event holds is the moment's."""
    return list(dict.fromkeys(events))


def is_compact(data: bytes) -> bool:
    """Whether the JSON is written without spaces between its parts, and UTF-8 as it is."""
    return data == json.dumps(json.loads(data), separators=(",", ":"), ensure_ascii=False).encode()


def skeleton(value: Any, name: str = "") -> Any:
    """Members in their order; values only where a client reads them, else their types."""
    if name == "meta_info":  # whose members come as they are measured
        value = dict(sorted(value.items()))
    if isinstance(value, dict):
        return {key: skeleton(member, key) for key, member in value.items()}
    if isinstance(value, list):
        items = [skeleton(member, "") for member in value]
        return items if len({json.dumps(item) for item in items}) > 1 else items[:1]
    if isinstance(value, str):
        return scrub(value) if name in LITERAL else "<str>"
    if value is None or isinstance(value, bool):
        return value
    return value if name in LITERAL and isinstance(value, int) else f"<{type(value).__name__}>"


def scrub(text: str) -> str:
    """Without places in the source, random ids and numbers of tokens, which depend on the tokenizer."""
    text = re.sub(r'File "[^"]*", line \d+', 'File "<place>"', text)
    text = re.sub(r"\b((?:resp|msg|rs)_)?[0-9a-f]{32}", r"\1<hex>", text)
    # where and why is the JSON parser's own
    text = re.sub(r"'loc': \('body', \d+\), 'msg': 'JSON decode error'.*?}}", "<why>}", text)
    return re.sub(r"\d+(?= tokens)|(?<=a total of )\d+", "<n>", text)


def load() -> dict[str, Any]:
    """The real SGLang's answers by the request's name."""
    return dict(json.loads(GOLDEN.read_text()))


async def record(port: int, key: str) -> dict[str, Any]:
    """All answers of the engine on that port."""
    assert len({request.name for request in REQUESTS}) == len(REQUESTS)
    return {request.name: canonical(request, await send(port, request, key)) for request in REQUESTS}


async def names(port: int, key: str) -> dict[str, dict[str, str]]:
    """What the engine on that port has names for: families of /metrics with their labels, members of
    /server_info. Counters appear after their first event: REQUESTS come first.
    """
    key = f"Bearer {key}"
    metrics = (await fetch(port, "GET", "/metrics", authorization=key)).rest.decode()
    members = (await fetch(port, "GET", "/server_info", authorization=key)).json
    return {"metrics": families(metrics), "server_info": dict.fromkeys(members, "")}


def families(exposition: str) -> dict[str, str]:
    """Type and labels of SGLang's families."""
    found = dict(re.findall(r"^# TYPE (sglang:\S+) (\w+)$", exposition, re.MULTILINE))
    for name, kind in found.items():
        sample = re.search(rf"^{name}(?:_sum)?\{{(.*)\}}", exposition, re.MULTILINE)
        labels = re.findall(r'([a-z_]+)="', sample[1]) if sample else []
        found[name] = " ".join([kind, *labels])
    return found


def save(path: Path, members: dict[str, Any]) -> None:
    """As JSON, one member a line."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(member)}" for name, member in members.items())
    path.write_text(f"{{\n{lines}\n}}\n")


async def main(port: int, key: str) -> None:
    """Write both files anew."""
    answers = await record(port, key)
    save(GOLDEN, answers)
    save(NAMES, await names(port, key))
    print(f"{len(answers)} answers in {GOLDEN}")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""))
