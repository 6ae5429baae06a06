"""/v1/messages, Anthropic's: named events, no [DONE]."""

from __future__ import annotations

from . import shapes
from .answers import Answer, Choice

_REASONS = {"length": "max_tokens", "stop": "end_turn", "abort": "end_turn"}


class Messages:
    """A Dialect."""

    end, headers = b"", b""

    def events(self, choice: Choice) -> list[bytes]:
        answer, sequence = choice.answer, choice.sequence
        events = [] if choice.opened else [_event("message_start", message=_message(answer, started=True))]
        if not choice.opened:
            block = {"type": "text", "text": ""}
            events.append(_event("content_block_start", index=0, content_block=block))
            choice.opened = True
        if choice.sent < sequence.generated:
            delta = {"type": "text_delta", "text": answer.reply.text(choice.sent, sequence.generated)}
            events.append(_event("content_block_delta", index=0, delta=delta))
            choice.sent = sequence.generated
        return events

    def closing(self, answer: Answer) -> list[bytes]:
        (choice,) = answer.choices
        reason = {"stop_reason": _REASONS[choice.sequence.finish or "stop"]}
        return [
            _event("content_block_stop", index=0),
            _event("message_delta", delta=reason, usage={"output_tokens": answer.generated}),
            _event("message_stop"),
        ]

    def body(self, answer: Answer) -> bytes:
        return shapes.compact(_message(answer))


def _event(name: str, **members: object) -> bytes:
    return b"event: " + name.encode() + b"\n" + shapes.event({"type": name, **members})


def _message(answer: Answer, *, started: bool = False) -> shapes.Json:
    """The whole message; `started`: as the first event has it."""
    (choice,) = answer.choices
    used = {"input_tokens": sum(answer.ask.prompts), "output_tokens": 0 if started else answer.generated}
    text = {"type": "text", "text": answer.reply.text(0, choice.sequence.generated)}
    return {
        "id": f"msg_{answer.rid}",
        "type": "message",
        "role": "assistant",
        "content": [] if started else [text],
        "model": answer.ask.model,
        **({} if started else {"stop_reason": _REASONS[choice.sequence.finish or "stop"]}),
        "usage": used,
    }
