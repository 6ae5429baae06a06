"""Secrets out of everything that is kept or shown of a replica: its output, its last words, reasons, events.

PURE. Two kinds of secret are found: values that are known (`Mask(values)`: the replica's key, every --secret,
the YAML's secrets, the TLS key), in whatever quotes a program prints them, and what looks like one whoever
made it (SGLang prints `api_key='...'` in its server_args line; Hugging Face tokens; private keys).

A text arrives in pieces and a secret may be cut by two of them, so a `Masking` lets a line through only when
it is whole. Secrets of several lines (PEM) are masked line by line: what reads a log may begin in the middle.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Final
from urllib.parse import quote, quote_plus

LEAST: Final = 4
"""Characters. Shorter values (and lines of one) stay: "1" would be everywhere, and says nothing."""

STARS: Final = "***"

_LINE: Final = re.compile(r"[^\r\n]*(?:\r\n|[\r\n])|[^\r\n]+")
_LONG: Final = 65_536   # characters of a line without an end; then its head is let through
_KEPT: Final = 16_384   # of it: longer than anything that is masked in one piece

_PATTERNS: Final = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        # `api_key='sk-1'`, `'api_key': 'sk-1'`, `--api-key sk-1`, `REPLICA_API_KEY=sk-1`, `?api_key=sk-1&`
        r"api[_-]?key(?:['\"]?\s?[=:]\s?|\s)(?!None\b|null\b|True\b|False\b)"
        r"(?:'(?P<a>(?:\\.|[^'\\]){1,1024})'|\"(?P<b>(?:\\.|[^\"\\]){1,1024})\"|(?P<c>[^\s'\",)}&|]{1,1024}))",
        r"authorization\W{1,6}bearer\s+(?P<a>[\w.~+/=-]{1,1024})",
        r"\b(?P<a>hf_[a-z0-9]{16,128})",
        # On one line, its ends as `\n`; the lines of a whole one are below.
        r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----(?P<a>[^-]{1,8192})",
    )
)
_BEGIN: Final = re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----")
_END: Final = re.compile(r"-----END [A-Z ]{0,20}PRIVATE KEY-----")
_BLOCK_LINES: Final = 400   # 16384 bits of RSA are 200; other processes print in between
_BODY: Final = re.compile(   # after what SkyPilot puts before a line
    r"(?:\x1b\[[0-9;]*m)*(?:\([^()]*\))?(?:\x1b\[[0-9;]*m)*\s*(?P<a>[A-Za-z0-9+/]+={0,2})\s*"
)
_RUN: Final = re.compile(r"(?P<a>[A-Za-z0-9+/]{16,}={0,2})")


class Mask:
    """A function of text, and the maker of `Masking`s. Immutable."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        found: set[str] = set()
        for value in values:
            for part in re.split(r"[\r\n]+", value):
                part = part.strip()
                if len(part) >= LEAST and not part.startswith("-----"):   # PEM's own words
                    found |= set(_spellings(part))
        self._needles = tuple(sorted(found, key=len, reverse=True))

    def __repr__(self) -> str:   # never a value
        return f"<Mask of {len(self._needles)}>"

    def __call__(self, text: str) -> str:
        """The text without secrets; whole, so its last line needs no end."""
        masking = Masking(self)
        return masking.feed(text) + masking.end()

    def line(self, line: str) -> str:
        return _cover(line, self.spans(line))

    def spans(self, line: str) -> Iterator[tuple[int, int, int]]:
        """(where the evidence begins, where the secret begins, its end), for each found."""
        for needle in self._needles:
            at = line.find(needle)
            while at >= 0:
                yield at, at, at + len(needle)
                at = line.find(needle, at + 1)   # they may overlap
        for pattern in _PATTERNS:
            for match in pattern.finditer(line):
                yield match.start(), *match.span(str(match.lastgroup))


class Masking:
    """One stream of text. Mutable: the line that has no end yet, and the lines left of a private key."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask
        self._rest: list[str] = []   # joined when its end is there: it may come a character at a time
        self._length = 0             # of the rest
        self._block = 0

    def feed(self, text: str) -> str:
        """The next piece, cut anywhere; returns what may be seen by now."""
        end = max(text.rfind("\n"), text.rfind("\r")) + 1
        seen = []
        if end:
            whole = "".join([*self._rest, text[:end]])
            self._rest, self._length = [], 0
            seen = [self._line(match[0]) for match in _LINE.finditer(whole)]
        if end < len(text):
            self._rest.append(text[end:])
            self._length += len(text) - end
            if self._length > _LONG:
                seen.append(self._head())
        return "".join(seen)

    def end(self) -> str:
        """There is no more: the line without an end."""
        rest, self._rest, self._length = "".join(self._rest), [], 0
        return self._line(rest) if rest else ""

    def _line(self, line: str) -> str:
        if not self._block:
            began = _BEGIN.search(line)
            if began and not _END.search(line, began.end()):
                self._block = _BLOCK_LINES
            return self._mask.line(line)
        self._block -= 1
        if _END.search(line):
            self._block = 0
        spans = [(m.start("a"), *m.span("a")) for m in _RUN.finditer(line)]
        if body := _BODY.fullmatch(line):
            spans.append((body.start("a"), *body.span("a")))
        return _cover(line, [*spans, *self._mask.spans(line)])

    def _head(self) -> str:
        """Of an endless line, all that later pieces can tell nothing more about."""
        rest = "".join(self._rest)
        spans = list(self._mask.spans(rest))
        cut = len(rest) - _KEPT
        while over := [end for begin, _, end in spans if begin < cut < end]:
            cut = max(over)
        self._rest, self._length = [rest[cut:]], len(rest) - cut
        return _cover(rest[:cut], [span for span in spans if span[2] <= cut])


def _cover(line: str, spans: Iterable[tuple[int, int, int]]) -> str:
    """The line with stars in place of each secret; of several that overlap, in place of all."""
    covered: list[str] = []
    at = 0
    for _, begin, end in sorted(spans, key=lambda span: span[1:]):
        if end <= at:
            continue
        if begin > at or not covered:
            covered += [line[at:begin], STARS]
        at = end
    return "".join([*covered, line[at:]])


def _spellings(value: str) -> Iterator[str]:
    """As programs print it: bare, in JSON and in Python's repr, in a shell's quotes, in a URL."""
    yield value
    for ascii in (True, False):
        yield json.dumps(value, ensure_ascii=ascii)[1:-1]
    yield repr(value)[1:-1]
    yield repr(value + '"')[1:-2]   # in single quotes whatever quotes it holds
    yield shlex.quote(value).removeprefix("'").removesuffix("'")
    yield value.replace("'", "'\\''")                         # bash -x
    yield re.sub(r"([^\w@%+=:,./-])", r"\\\1", value)          # printf %q
    yield re.sub(r'([\\"$`])', r"\\\1", value)                # in a shell's double quotes
    for spelling in (quote(value), quote(value, safe=""), quote_plus(value)):
        yield spelling
        yield re.sub(r"%[0-9A-F]{2}", lambda match: match[0].lower(), spelling)
