"""What the simulator says, cut into tokens. Always the same text for the same settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

END_OF_THINKING = "</think>"

REASONING = (
    "Okay, so I need to figure out how many times the letter R appears in the word strawberry. Let me "
    "spell it out: S, T, R, A, W, B, E, R, R, Y. The first R is the third letter, right after the T. "
    "Then come A, W, B and E, none of which is an R. After the E there are two more in a row, the "
    "eighth and the ninth letter, and the word ends with a Y. So one in the first half and two in the "
    "second. That makes three. Let me count again to be sure: R, R, R. Yes, three.\n"
)
ANSWER = (
    'There are **3** letters R in the word "strawberry". Here is the word, letter by letter: '
    "s-t-**r**-a-w-b-e-**r**-**r**-y. The first one stands at position 3, between the t and the a; the "
    "other two stand side by side at positions 8 and 9, just before the final y. It is a question that "
    "language models are known to get wrong, because they read tokens and not letters: the word reaches "
    "them in two or three pieces, and how many of each letter a piece holds is something that they have "
    "to remember, not something that they can see. Spelling the word out, as above, puts each letter "
    "into a token of its own, and then the counting is easy. This text was not written by a language "
    "model, though: it comes from the bundled simulator, which speaks like an SGLang server, takes as "
    "long as one, and always gives this one answer."
)

# About four characters a token, as usual for English: a piece of a word with the white space before it, or
# a run of signs.
_TOKEN = re.compile(r"\s*[^\W\d_]{1,5}|\s*\d{1,3}|\s*(?:[^\w\s]|_)+|\s+")


def tokenize(text: str) -> list[str]:
    """Pieces whose concatenation is `text`; `</think>` is one of them, as in DeepSeek-R1's vocabulary."""
    tokens: list[str] = []
    for part in re.split(f"({re.escape(END_OF_THINKING)})", text):
        tokens += [part] if part == END_OF_THINKING else _TOKEN.findall(part)
    return tokens


def count_tokens(text: str) -> int:
    """The length of a prompt in tokens, cheaply: four characters each, rounded up."""
    return (len(text) + 3) // 4


def token_ids(text: str) -> list[int]:
    """The tokens of a text: four bytes each, as one number."""
    data = text.encode()
    return [int.from_bytes(data[start : start + 4]) for start in range(0, len(data), 4)]


def text_of(ids: list[int]) -> str:
    """The text of such tokens."""
    pieces = [number.to_bytes((number.bit_length() + 7) // 8 or 1) for number in ids]
    return b"".join(pieces).decode(errors="replace")


@dataclass(frozen=True, slots=True)
class Reply:
    """A text in tokens. `thinking` of them come before the answer (the end mark counts); -1: it never
    stops thinking.
    """

    tokens: tuple[str, ...]
    thinking: int

    @classmethod
    def make(cls, text: str | None, *, reasoning: bool) -> Reply:
        """The reply for `--reply text` (None: the built-in answer); with a reasoning parser some thinking
        comes first.
        """
        text = ANSWER if text is None else text
        if reasoning and END_OF_THINKING not in text:
            text = REASONING + END_OF_THINKING + "\n\n" + text
        tokens = tuple(tokenize(text)) or ("",)
        if not reasoning:
            return cls(tokens, 0)
        return cls(tokens, tokens.index(END_OF_THINKING) + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def text(self, start: int, end: int) -> str:
        """The text of the tokens start..end; past the end of the reply (`ignore_eos`) the answer begins
        anew.
        """
        if end <= len(self.tokens):
            return "".join(self.tokens[start:end])
        answer = self.tokens[self.thinking :] or self.tokens
        size = len(self.tokens)
        pieces = list(self.tokens[start:size])
        for index in range(max(start, size), end):
            place = (index - size) % len(answer)
            pieces.append(answer[place] if place else " " + answer[0].lstrip())
        return "".join(pieces)

    def split(self, start: int, end: int) -> tuple[str, str]:
        """The same as `text`, parted into thinking and answer; the end mark and the white space after it
        belong to neither.
        """
        mark = self.thinking - 1
        if self.thinking == 0 or start > mark:
            answer = self.text(start, end)
            return "", answer.lstrip("\n") if self.thinking and start == mark + 1 else answer
        thinking = self.text(start, min(end, mark))
        return thinking, self.text(mark + 1, end).lstrip("\n") if end > mark + 1 else ""
