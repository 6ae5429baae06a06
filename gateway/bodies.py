"""A request's JSON body: read, checked as far as it is cheap, and given our `rid`. PURE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from gateway.errors import BadRequest
from gateway.openai import Body, Endpoint


class Facts(NamedTuple):
    """What the gateway wants to know of a body. `model`: as it was sent, or None."""

    model: str | None
    stream: bool
    takes_rid: bool


def facts(raw: bytes, endpoint: Endpoint) -> Facts:
    """Raises BadRequest, as `parse`."""
    body = parse(raw, endpoint)
    return Facts(body.get("model"), bool(body.get("stream")), takes_rid(body, endpoint))


def parse(raw: bytes, endpoint: Endpoint) -> dict[str, Any]:
    """The request's JSON object, checked as far as it is cheap: after a 200 was committed no honest 400 is
    possible.

    Raises BadRequest with the member at fault as `param`.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = _parse_slowly(raw)
    if not isinstance(body, dict):
        raise BadRequest(f"The request body must be a JSON object, not {_kind(body)}.")
    for group in endpoint.required:
        for name in group:
            if body.get(name) is not None:
                break
        else:
            names = " or ".join(f"'{name}'" for name in group)
            raise BadRequest(
                f"Missing required member {names}.", param=group[0], code="missing_required_parameter"
            )
    _check_members(body, endpoint)
    return body


def _parse_slowly(raw: bytes) -> Any:
    """What orjson does not take: what is wrong with it, or what Python (and SGLang) reads all the same, such
    as an unpaired surrogate or a NaN."""
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRequest(f"The request body is not UTF-8: {error.reason} at byte {error.start}.") from None
    except RecursionError:
        raise BadRequest("The request body nests too deeply to be read.") from None
    except ValueError as error:
        what = "is empty" if not raw.strip() else f"is not valid JSON: {error}"
        raise BadRequest(f"The request body {what}. Send a JSON object.") from None


def _check_members(body: Body, endpoint: Endpoint) -> None:
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        # SGLang would read "true" or 1 as true: then it streams where we think that it does not.
        raise BadRequest(f"'stream' must be true or false, not {_kind(stream)}.", param="stream")
    if stream and not endpoint.streams:
        raise BadRequest(f"{endpoint.path} cannot stream: leave 'stream' out.", param="stream")
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise BadRequest(f"'model' must be a string, not {_kind(model)}.", param="model")
    for name in endpoint.arrays:
        value = body.get(name)  # null is as good as absent: clients send all their members
        if value is not None and (not isinstance(value, list) or not value):
            raise BadRequest(f"'{name}' must be a non-empty array.", param=name)
        if name == "messages":
            _check_messages(value or ())
    for name in _NUMBERS:
        value = body.get(name)
        if value is not None:
            _check_number(name, value)
    if endpoint.path == "/v1/responses":
        for name in ("previous_response_id", "background", "conversation"):
            if body.get(name):
                raise BadRequest(
                    f"'{name}' is not served: its state would live in one replica, which may be gone by the "
                    "next request. Send the whole conversation as 'input'.",
                    param=name,
                    code="unsupported_parameter",
                )
        if body.get("store") is True:
            raise BadRequest(
                "'store: true' is not served: a stored response would live in one replica. Leave it out.",
                param="store",
                code="unsupported_parameter",
            )


_WHOLE = {"max_tokens": 0, "max_completion_tokens": 0, "n": 1}  # at least
_REAL: dict[str, float | None] = {"temperature": None, "top_p": 1}  # at most
_NUMBERS = (*_WHOLE, *_REAL)
_HUGE = 1e9  # no temperature; also keeps Infinity out, which Python reads and JSON does not have


def _check_messages(messages: Sequence[object]) -> None:
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(
                f"'messages[{i}]' must be an object with a 'role'.",
                param=f"messages[{i}]",
                code="invalid_type",
            )


def _check_number(name: str, value: object) -> None:
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    low = _WHOLE.get(name)
    if low is not None:
        if number is None or not number >= low or number % 1:  # no number is at least NaN; inf % 1 is NaN
            raise BadRequest(f"'{name}' must be a whole number of at least {low}.", param=name)
        return
    high = _REAL[name]
    if number is None or not 0 <= number <= (high or _HUGE):
        bound = f"between 0 and {high}" if high else "of at least 0"
        raise BadRequest(f"'{name}' must be a number {bound}.", param=name)


def takes_rid(body: Body, endpoint: Endpoint) -> bool:
    """Whether SGLang accepts one `rid` for this request: a single prompt, one choice, and none there yet."""
    if endpoint.prompt is None or "rid" in body or body.get("n") not in (None, 1):
        return False
    if endpoint.path == "/generate":
        params = body.get("sampling_params")
        if isinstance(params, list) or (isinstance(params, dict) and params.get("n") not in (None, 1)):
            return False
        ids = body.get("input_ids")
        if ids is not None:
            return all(type(x) is int for x in ids)
    prompt = body.get(endpoint.prompt)
    if endpoint.prompt == "messages" or isinstance(prompt, str):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(type(x) is int for x in prompt)


def with_rid(raw: bytes, rid: str) -> tuple[bytes, bytes]:
    """The same bytes with `"rid"` as first member, in two pieces: a body may be large. `raw` is a non-empty
    JSON object in UTF-8."""
    at = raw.index(b"{") + 1
    return b'%b"rid":"%b",' % (raw[:at], rid.encode()), raw[at:]


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "an array", dict: "an object"}
    return names.get(type(value), "a number")
