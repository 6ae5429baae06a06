"""What a `run` script says about the server that it starts: flags read out of shell text, without running
it.

PURE. Only literal text is understood: quotes, continued lines, comments, `bash -c "..."`, and variables
whose value is written in `envs` or assigned earlier in the script. Anything that needs a shell (`$(...)`,
arithmetic, a variable of the machine) makes that one value unknown, never wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise

MODEL_FLAGS = ("--model-path", "--model")
"""SGLang 0.5.23: `--model` is an alias of `--model-path` (srt/server_args fields/model.py)."""

TLS_KEY = "REPLICA_TLS_KEY"
TLS_CERT = "REPLICA_TLS_CERT"
"""The secrets through which the gateway gives a replica its TLS key and certificate, PEM texts (tls.py); they
need no value in the YAML, and are empty where the replica is spoken to in plain."""

_COMMENT = re.compile(r"^\s*#.*$", re.MULTILINE)
_USES_TLS = re.compile(rf"\$\{{?{TLS_CERT}\b")
_TOKEN = re.compile(
    r"""(?P<comment>(?<!\S)\#[^\n]*)
      | (?P<end>\n|;|\|\|?|&&?|[()])
      | (?P<word>(?:\$\{[^}\n]*\}|[^\s'"\\;|&()]|\\.|'[^']*'|"(?:\\.|[^"\\])*")+)""",
    re.VERBOSE | re.DOTALL,
)
_PIECE = re.compile(r"""'([^']*)'|"((?:\\.|[^"\\])*)"|\\(.)|([^'"\\]+)""", re.DOTALL)
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VALUED_FLAG = re.compile(r"--[\w-]+=")
_VARIABLE = re.compile(r"\$(?:(?P<bare>[A-Za-z_]\w*)|\{(?P<name>[A-Za-z_]\w*)(?::?-(?P<default>[^}]*))?\})")


def model(run: str, envs: Mapping[str, str]) -> str | None:
    """The name under which the server of `run` is known: `--served-model-name`, else the model's path
    or HF name, which is also the first plain word after `sglang serve`. None when the script does
    not say it literally."""
    return flag(run, envs, "--served-model-name") or flag(run, envs, *MODEL_FLAGS) or _served(run, envs)


def flag(run: str, envs: Mapping[str, str], *names: str) -> str | None:
    """The literal value of the first of these flags, `--flag value` or `--flag=value`. A command that
    names sglang goes before others of the script, so that a download or conversion step is not taken
    for the server."""
    for words in _servers_first(run, envs):
        for word, following in pairwise([*words, None]):
            head, equals, tail = (word or "").partition("=")
            value = tail if equals else following
            if head in names and value:
                return value
    return None


def has_flag(run: str, name: str) -> bool:
    """Whether any command of the script is given this flag, with whatever value."""
    return any((word or "").partition("=")[0] == name for words in _commands(run, {}) for word in words)


def uses_certificate(run: str) -> bool:
    """Whether the script does anything with the certificate that it is given."""
    return _USES_TLS.search(_COMMENT.sub("", run)) is not None


def _served(run: str, envs: Mapping[str, str]) -> str | None:
    for words in _commands(run, envs):
        for launcher, verb, name in zip(words, words[1:], words[2:], strict=False):
            if verb == "serve" and launcher and launcher.endswith("sglang") and name and name[0] != "-":
                return name
    return None


def _servers_first(run: str, envs: Mapping[str, str]) -> list[list[str | None]]:
    return sorted(_commands(run, envs), key=lambda words: not any("sglang" in (word or "") for word in words))


def _commands(run: str, envs: Mapping[str, str]) -> Iterator[list[str | None]]:
    """The commands of a script as lists of words; a word whose value is not literal is None."""
    variables = dict(envs)
    words: list[str | None] = []
    for token in _TOKEN.finditer(run.replace("\\\n", "")):
        if token["end"]:
            yield words
            words = []
        elif token["word"]:
            word = _expand(_unquote(token["word"]), variables)
            assignment = _ASSIGNMENT.fullmatch(token["word"])
            if assignment and words in ([], ["export"]):  # a line `A=1`, `export A=1`, `A=1 command` alike
                variables.pop(assignment[1], None)
                if word is not None:
                    variables[assignment[1]] = word.partition("=")[2]
                continue
            if word is None and (named := _VALUED_FLAG.match(token["word"])):
                word = named[0]  # the flag is known though its value is not
            if word and re.search(r"\s", word):  # bash -c "python -m sglang.launch_server ..."
                yield from _commands(word, variables)
            words.append(word)
    yield words


def _unquote(word: str) -> str:
    return "".join(
        single or _ESCAPED.sub(r"\1", double) or escaped or bare
        for single, double, escaped, bare in _PIECE.findall(word)
    )


def _expand(word: str, variables: Mapping[str, str]) -> str | None:
    def value(match: re.Match[str]) -> str:
        # An unknown variable stays as it is, so its dollar makes the whole word unknown below.
        return variables.get(match["bare"] or match["name"]) or match["default"] or match[0]

    expanded = _VARIABLE.sub(value, word)
    return None if "$" in expanded or "`" in expanded else expanded
