"""/v1/responses, OpenAI's newer endpoint: named and numbered events, no [DONE]."""

from __future__ import annotations

from . import shapes
from .answers import Answer, Choice


class Responses:
    """A Dialect."""

    end, headers = b"", b"cache-control: no-cache\r\n"

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence = choice.answer, choice.sequence
        events = []
        if not choice.opened:
            choice.opened = True
            started = _response(answer, started=True)
            item = {**_item(answer, "in_progress"), "content": []}
            events += [
                _named(answer, "response.created", response=started),
                _named(answer, "response.in_progress", response=started),
                _numbered(answer, "response.output_item.added", item=item),
                _part(answer, "response.content_part.added", part=_text("")),
            ]
        if choice.sent < sequence.generated:
            text = answer.reply.text(choice.sent, sequence.generated)
            events.append(_part(answer, "response.output_text.delta", delta=text, logprobs=[]))
            choice.sent = sequence.generated
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        text, item = _whole(answer), _item(answer, "completed")
        whole = _response(answer)
        return [
            _part(answer, "response.output_text.done", logprobs=[], text=text),
            _part(answer, "response.content_part.done", part=_text(text)),
            _numbered(answer, "response.output_item.done", item=item),
            _named(answer, f"response.{whole['status']}", response=whole),
        ]

    def body(self, answer: Answer) -> bytes:
        return shapes.compact(_response(answer))


def _named(answer: Answer, name: str, **members: object) -> bytes:
    """An event that says its name first."""
    return _event(name, {"type": name, **members, "sequence_number": answer.number()})


def _part(answer: Answer, name: str, **members: object) -> bytes:
    """An event about the text."""
    return _numbered(answer, name, content_index=0, item_id=f"msg_{answer.rid}", **members)


def _numbered(answer: Answer, name: str, **members: object) -> bytes:
    """An event whose members are sorted, its number and name among them."""
    data = {**members, "output_index": 0, "sequence_number": answer.number(), "type": name}
    order = sorted(data) if "item" not in data else list(data)
    return _event(name, {member: data[member] for member in order})


def _event(name: str, data: shapes.Json) -> bytes:
    return b"event: " + name.encode() + b"\n" + shapes.event(data)


def _whole(answer: Answer) -> str:
    return answer.reply.text(0, answer.choices[0].sequence.generated)


def _text(text: str) -> shapes.Json:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def _item(answer: Answer, status: str) -> shapes.Json:
    return {
        "id": f"msg_{answer.rid}",
        "content": [_text(_whole(answer))],
        "role": "assistant",
        "status": status,
        "type": "message",
        "phase": "final_answer",
    }


def _response(answer: Answer, *, started: bool = False) -> shapes.Json:
    """The whole response; `started`: as the first events have it."""
    ask, cut = answer.ask, answer.choices[0].sequence.finish == "length"
    used = {
        "input_tokens": sum(ask.prompts),
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer.generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": sum(ask.prompts) + answer.generated,
    }
    return {
        "id": f"resp_{answer.rid}",
        "object": "response",
        "created_at": answer.created,
        "model": ask.model,
        "output": [] if started else [_item(answer, "completed")],
        "status": "in_progress" if started else "incomplete" if cut else "completed",
        "usage": None if started else used,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut and not started else None,
        "instructions": None,
        "max_output_tokens": ask.max_new,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": None,
        "text": None if started else {"format": {"type": "text"}},
        "top_p": None,
        "truncation": "disabled",
        "user": None,
        "metadata": {},
    }
