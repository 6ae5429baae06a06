"""Bodies that are no request at all, refused in pydantic's words, as SGLang passes them on."""

from __future__ import annotations

import json
from typing import Any

from . import shapes


class Refused(Exception):
    """The request is answered without the engine: with this status and body."""

    def __init__(self, status: int, body: bytes, content_type: bytes = b"application/json") -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.content_type = content_type


def read_object(path: str, content_type: str, body: bytes) -> dict[str, Any]:
    """The JSON object in the body. Raises Refused."""
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise Refused(400, shapes.wrong_content_type())
    if not body:
        raise invalid(path, {"type": "missing", "loc": ("body",), "msg": "Field required", "input": None})
    try:
        data = json.loads(body)
    except ValueError as error:
        position = getattr(error, "pos", 0)
        reason = getattr(error, "msg", "invalid utf-8") if position < len(body) else "unexpected end of data"
        raise invalid(path, not_json(position, reason)) from None
    if not isinstance(data, dict):
        raise Refused(500, b"Internal Server Error", b"text/plain; charset=utf-8")
    return data


def not_json(position: int, reason: str) -> shapes.Json:
    """What pydantic says of a text that is no JSON."""
    place = {"type": "json_invalid", "loc": ("body", position), "msg": "JSON decode error", "input": {}}
    return {**place, "ctx": {"error": reason}}


def missing(data: object, *place: object) -> shapes.Json:
    """What pydantic says of a member that is not there."""
    return {"type": "missing", "loc": ("body", *place), "msg": "Field required", "input": data}


def wrong_value(message: str, given: object, *place: object) -> shapes.Json:
    """What pydantic says of a value that a check of SGLang's own refuses."""
    found = {"type": "value_error", "loc": ("body", *place), "msg": f"Value error, {message}", "input": given}
    return {**found, "ctx": {"error": ValueError(message)}}


def invalid(path: str, *errors: shapes.Json) -> Refused:
    """The refusal of a body for errors that pydantic found."""
    return Refused(400, shapes.invalid_body("POST", path, [repr(error) for error in errors]))
