"""What a request asks for: body -> Ask, or Refused with the very answer that SGLang gives. Plain
functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from . import shapes
from .reply import count_tokens

ROLES = ("system", "assistant", "tool", "function", "developer", "latest_reminder", "root")
NOT_AN_EMBEDDER = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)
_FUNCTIONS = {
    "/v1/chat/completions": "openai_v1_chat_completions",
    "/v1/completions": "openai_v1_completions",
    "/generate": "generate_request",
}


class Refused(Exception):
    """The request is answered without the engine: with this status and body."""

    def __init__(self, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.content_type = content_type


@dataclass(frozen=True, slots=True)
class Ask:
    """One valid request, in the engine's terms."""

    path: str
    model: str
    prompts: tuple[int, ...]  # lengths in tokens
    n: int
    max_new: int | None  # None: as long as the reply is
    ignore_eos: bool
    stream: bool
    include_usage: bool
    continuous_usage: bool
    separate_reasoning: bool
    rid: str | None
    user: str | None


def parse(path: str, content_type: str, body: bytes, context_length: int) -> Ask:
    """Read and check a body for one of the generating endpoints. Raises Refused."""
    data = _json(path, content_type, body)
    if path == "/generate":
        return _generate(data, context_length)
    if path == "/v1/chat/completions":
        prompts: tuple[int, ...] = (_chat_prompt(path, data),)
        limit = _first(data, "max_completion_tokens", "max_tokens")
    else:
        prompts = _prompts(path, data)
        limit = data.get("max_tokens", 16)  # the OpenAI default of this endpoint, kept by SGLang
    _check_sampling(data, limit, prompts[0], context_length)
    options = data.get("stream_options") or {}
    rid, user, n = data.get("rid"), data.get("user"), data.get("n")
    if n == 0:
        raise Refused(400, shapes.flat_error("range() arg 3 must not be zero", "BadRequest"))
    return Ask(
        path=path,
        model=str(data.get("model") or "default"),
        prompts=prompts,
        n=n if isinstance(n, int) else 1,
        max_new=limit if isinstance(limit, int) else None,
        ignore_eos=bool(data.get("ignore_eos")),
        stream=bool(data.get("stream")),
        include_usage=bool(options.get("include_usage")),
        continuous_usage=bool(options.get("continuous_usage_stats")),
        separate_reasoning=data.get("separate_reasoning", True) is not False,
        rid=rid if isinstance(rid, str) else None,
        user=user if isinstance(user, str) else None,
    )


def _json(path: str, content_type: str, body: bytes) -> dict[str, Any]:
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refused(400, shapes.wrong_content_type())
    if not body:
        raise _invalid(path, "{'type': 'missing', 'loc': ('body',), 'msg': 'Field required', 'input': None}")
    try:
        data = json.loads(body)
    except ValueError as error:
        position = getattr(error, "pos", 0)
        reason = getattr(error, "msg", "invalid utf-8") if position < len(body) else "unexpected end of data"
        raise _invalid(
            path,
            f"{{'type': 'json_invalid', 'loc': ('body', {position}), 'msg': 'JSON decode error', "
            f"'input': {{}}, "
            f"'ctx': {{'error': {reason!r}}}}}",
        ) from None
    if not isinstance(data, dict):
        raise Refused(500, b"Internal Server Error", b"text/plain; charset=utf-8")
    return data


def _invalid(path: str, *errors: str) -> Refused:
    return Refused(400, shapes.invalid_body(_FUNCTIONS.get(path, "endpoint"), "POST", path, list(errors)))


def _bad(message: str) -> Refused:
    return Refused(400, shapes.flat_error(message))


def _first(data: dict[str, Any], *names: str) -> Any:
    return next((data[name] for name in names if data.get(name) is not None), None)


def _chat_prompt(path: str, data: dict[str, Any]) -> int:
    """The prompt's length in tokens: the texts, and the template's marks around them."""
    messages = data.get("messages")
    if not isinstance(messages, list):
        given = {
            **{k: v for k, v in data.items() if k != "messages"},
            "tool_choice": data.get("tool_choice", "none"),
        }
        raise _invalid(
            path,
            f"{{'type': 'missing', 'loc': ('body', 'messages'), 'msg': 'Field required', "
            f"'input': {given!r}}}",
        )
    if not messages:
        raise _bad("Messages cannot be empty.")
    tokens = 3
    for place, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role.lower() not in (*ROLES, "user"):
            allowed = ", ".join(repr(name) for name in ROLES)
            raise _invalid(
                path,
                f"{{'type': 'value_error', 'loc': ('body', 'messages', {place}, 'role'), "
                f"'msg': \"Value error, 'role' must be one of {allowed} (case-insensitive).\", 'input': "
                f"{role!r}}}",
                f"{{'type': 'literal_error', 'loc': ('body', 'messages', {place}, 'role'), "
                f"'msg': \"Input should be 'user'\", 'input': {role!r}, 'ctx': {{'expected': \"'user'\"}}}}",
            )
        tokens += 4 + _content_tokens(message.get("content"))
    choice = data.get("tool_choice")
    if isinstance(choice, dict) and not data.get("tools"):
        raise _bad("Tools cannot be empty if tool choice is set to a specific tool.")
    if data.get("tools"):
        tokens += count_tokens(json.dumps(data["tools"]))
    return tokens


def _content_tokens(content: object) -> int:
    if isinstance(content, str):
        return count_tokens(content)
    tokens = 0
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise _bad(f"Model only supports text input; received unsupported content type {kind!r}.")
        tokens += count_tokens(str(part.get("text", "")))
    return tokens


def _prompts(path: str, data: dict[str, Any]) -> tuple[int, ...]:
    prompt = data.get("prompt")
    if prompt is None:
        raise _invalid(
            path,
            f"{{'type': 'missing', 'loc': ('body', 'prompt'), 'msg': 'Field required', 'input': {data!r}}}",
        )
    if isinstance(prompt, str):
        return (max(1, count_tokens(prompt)),)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return (len(prompt),)
        return tuple(max(1, count_tokens(p) if isinstance(p, str) else len(p)) for p in prompt)
    raise _bad("Prompt cannot be empty")


def _check_sampling(data: dict[str, Any], limit: object, prompt: int, context_length: int) -> None:
    temperature = data.get("temperature")
    if isinstance(temperature, (int, float)) and not (math.isfinite(temperature) and temperature >= 0):
        raise _bad(f"temperature must be a non-negative finite number, got {float(temperature)}.")
    if isinstance(limit, int) and limit < 0:
        raise _bad(f"max_new_tokens must be at least 0, got {limit}.")
    if prompt >= context_length:
        raise _bad(
            f"The input ({prompt} tokens) is longer than the model's context length ({context_length} "
            f"tokens)."
        )
    if isinstance(limit, int) and prompt + limit > context_length:
        raise _bad(
            f"Requested token count exceeds the model's maximum context length of {context_length} "
            f"tokens. You requested "
            f"a total of {prompt + limit} tokens: {prompt} tokens from the input messages and {limit} "
            f"tokens for the "
            "completion. Please reduce the number of tokens in the input messages or the completion to "
            "fit within the limit."
        )


def _generate(data: dict[str, Any], context_length: int) -> Ask:
    """SGLang's own endpoint. Its errors are wrapped, unlike those of the OpenAI ones."""
    text, ids = data.get("text"), data.get("input_ids")
    if not isinstance(text, str) and not isinstance(ids, list):
        message = "Either text, input_ids or input_embeds should be provided."
        raise Refused(400, shapes.compact({"error": {"message": message}}))
    sampling = data.get("sampling_params") or {}
    limit, rid = sampling.get("max_new_tokens", 128), data.get("rid")
    prompt = max(1, count_tokens(text) if isinstance(text, str) else len(ids or ()))
    _check_sampling(sampling, limit, prompt, context_length)
    return Ask(
        path="/generate",
        model="default",
        prompts=(prompt,),
        n=int(sampling.get("n") or 1),
        max_new=limit if isinstance(limit, int) else None,
        ignore_eos=bool(sampling.get("ignore_eos")),
        stream=bool(data.get("stream")),
        include_usage=False,
        continuous_usage=False,
        separate_reasoning=False,
        rid=rid if isinstance(rid, str) else None,
        user=None,
    )
