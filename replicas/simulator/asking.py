"""What a request asks for: body -> Ask, or Refused with the very answer that SGLang gives. Plain
functions.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from . import shapes
from .invalid import Refused, invalid, missing, read_object, wrong_value
from .reply import count_tokens

ROLES = ("system", "assistant", "tool", "function", "developer", "latest_reminder", "root")
NOT_AN_EMBEDDER = (
    "This model does not appear to be an embedding model by default. "
    "Please add `--is-embedding` when launching the server or try another model."
)
NO_LABELS = "label_token_ids is required for generation (CausalLM) models."


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
    logprobs: int | None = None  # alternatives a token; None: no log-probabilities


def parse(path: str, content_type: str, body: bytes, context_length: int) -> Ask:
    """Read and check a body for one of the generating endpoints. Raises Refused."""
    data = read_object(path, content_type, body)
    if path == "/generate":
        return _generate(data, context_length)
    if path == "/v1/messages":
        return _messages(path, data, context_length)
    if path == "/v1/responses":
        return _responses(path, data, context_length)
    _check_numbers(path, data)
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
        logprobs=_top_logprobs(data),
    )


def _top_logprobs(data: dict[str, Any]) -> int | None:
    """How many alternatives a token's log-probability is wanted with; None: it is not wanted."""
    top = data.get("top_logprobs")
    return (top if isinstance(top, int) else 0) if data.get("logprobs") is True else None


def _bad(message: str) -> Refused:
    return Refused(400, shapes.flat_error(message))


def _first(data: dict[str, Any], *names: str) -> Any:
    return next((data[name] for name in names if data.get(name) is not None), None)


def _chat_prompt(path: str, data: dict[str, Any]) -> int:
    """The prompt's length in tokens: the texts, and the template's marks around them."""
    messages = data.get("messages")
    if "messages" not in data:
        given = {**data, "tool_choice": data.get("tool_choice", "none")}
        raise invalid(path, missing(given, "messages"))
    if not isinstance(messages, list):
        wrong = {"type": "list_type", "loc": ("body", "messages"), "msg": "Input should be a valid list"}
        raise invalid(path, {**wrong, "input": messages})
    if not messages:
        raise _bad("Messages cannot be empty.")
    tokens = 3
    for index, message in enumerate(messages):
        _check_role(path, index, message)
        tokens += 4 + _content_tokens(message.get("content"))
    choice = data.get("tool_choice")
    if isinstance(choice, dict) and not data.get("tools"):
        raise _bad("Tools cannot be empty if tool choice is set to a specific tool.")
    if data.get("tools"):
        tokens += count_tokens(json.dumps(data["tools"]))
    return tokens


def _check_role(path: str, index: int, message: object) -> None:
    """SGLang knows two shapes of a message, and says of both why this one is neither."""
    places = [
        ("messages", index, f"function-after[validate_thinking_parts_role(), {shape}]", "role")
        for shape in ("ChatCompletionMessageGenericParam", "ChatCompletionMessageUserParam")
    ]
    if not isinstance(message, dict) or "role" not in message:
        raise invalid(path, *(missing(message, *place) for place in places))
    role = message["role"]
    if role == "user" or (isinstance(role, str) and role.lower() in ROLES):
        return
    allowed = ", ".join(repr(name) for name in ROLES)
    other = {"type": "literal_error", "loc": ("body", *places[1]), "msg": "Input should be 'user'"}
    raise invalid(
        path,
        wrong_value(f"'role' must be one of {allowed} (case-insensitive).", role, *places[0]),
        {**other, "input": role, "ctx": {"expected": "'user'"}},
    )


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
        raise invalid(path, missing(data, "prompt"))
    if isinstance(prompt, str):
        return (max(1, count_tokens(prompt)),)
    if isinstance(prompt, list) and prompt:
        if all(isinstance(token, int) for token in prompt):
            return (len(prompt),)
        return tuple(max(1, count_tokens(p) if isinstance(p, str) else len(p)) for p in prompt)
    raise _bad("Prompt cannot be empty")


def _check_numbers(path: str, data: dict[str, Any]) -> None:
    """A text where a whole number is wanted."""
    for name in ("max_tokens", "max_completion_tokens", "n"):
        if isinstance(given := data.get(name), str) and not given.strip().lstrip("+-").isdigit():
            wrong = "Input should be a valid integer, unable to parse string as an integer"
            raise invalid(path, {"type": "int_parsing", "loc": ("body", name), "msg": wrong, "input": given})


def _check_sampling(data: dict[str, Any], limit: object, prompt: int, context_length: int) -> None:
    temperature = data.get("temperature")
    if isinstance(temperature, (int, float)) and not (math.isfinite(temperature) and temperature >= 0):
        raise _bad(f"temperature must be a non-negative finite number, got {float(temperature)}.")
    top_p = data.get("top_p")
    if isinstance(top_p, (int, float)) and not 0 < top_p <= 1:
        raise _bad(f"top_p must be in (0, 1], got {float(top_p)}.")
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


def _messages(path: str, data: dict[str, Any], context_length: int) -> Ask:
    """Anthropic's endpoint, with its own errors."""
    for name in ("model", "messages", "max_tokens"):
        if name not in data:
            error = {"type": "invalid_request_error", "message": f"{name}: Field required"}
            raise Refused(400, shapes.compact({"type": "error", "error": error}))
    prompt = _chat_prompt(path, data)
    _check_sampling(data, data["max_tokens"], prompt, context_length)
    return _one(path, data, prompt, data["max_tokens"])


def _responses(path: str, data: dict[str, Any], context_length: int) -> Ask:
    """OpenAI's newer endpoint; no errors of it are flat."""
    given = data.get("input")
    if given is None:
        raise invalid(path, missing(data, "input"))
    prompt = 7 + count_tokens(given if isinstance(given, str) else json.dumps(given))
    limit = data.get("max_output_tokens")
    _check_sampling(data, limit, prompt, context_length)
    return _one(path, data, prompt, limit)


def _one(path: str, data: dict[str, Any], prompt: int, limit: object) -> Ask:
    """One prompt, one choice."""
    rid = data.get("rid")
    return Ask(
        path=path,
        model=str(data.get("model") or "default"),
        prompts=(prompt,),
        n=1,
        max_new=limit if isinstance(limit, int) else None,
        ignore_eos=False,
        stream=bool(data.get("stream")),
        include_usage=False,
        continuous_usage=False,
        separate_reasoning=True,
        rid=rid if isinstance(rid, str) else None,
        user=None,
    )
