"""A YAML file as one mapping, with the mistakes that a YAML parser lets through refused: PURE, shared
by spec.py and schema.py."""

from __future__ import annotations

from typing import Any

import yaml


class SpecError(ValueError):
    """A YAML that cannot be used. `str` is one line: file, YAML path, what is allowed."""


def read(text: str) -> dict[Any, Any]:
    """The only document of `text`. Raises SpecError for bad syntax, a key written twice, anything but
    one mapping."""
    try:
        documents = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
        for node in documents:
            _refuse_twice(node, "", set(), set())
        data = [yaml.safe_load(text)] if len(documents) == 1 else []
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise SpecError(f"{where}is not YAML: {one_line(error.problem or error.context)}") from None
    except RecursionError:
        raise SpecError("is nested too deeply") from None
    except Exception as error:  # PyYAML lets through what int(), date() and ord() raise for a bad scalar
        raise SpecError(f"is not YAML: {one_line(error)}") from None
    if len(documents) > 1:
        raise SpecError(f"has {len(documents)} YAML documents; one task with its `service:` is allowed")
    if not data or not isinstance(data[0], dict):
        raise SpecError(
            f"must be a mapping such as `name: ...`, not {shown(data[0]) if data else 'an empty file'}"
        )
    return data[0]


def shown(value: Any, limit: int = 60) -> str:
    """A value of the YAML as a message shows it: one line, at most `limit` characters."""
    text = _WORDS[value] if value is None or isinstance(value, bool) else one_line(repr(value))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def one_line(value: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(value).split()))


_WORDS = {None: "null", True: "true", False: "false"}


def _refuse_twice(node: yaml.Node, path: str, done: set[int], above: set[int]) -> None:
    """PyYAML keeps the later of two equal keys without a word; SkyPilot refuses them, and so do we.
    Nodes by id: `done` were walked already (aliases), `above` hold this one."""
    if id(node) in above:
        raise SpecError(f"{path.removesuffix('.')}: is an alias of what it stands in")
    if id(node) in done or isinstance(node, yaml.ScalarNode):
        return
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise SpecError(f"line {key.start_mark.line + 1}: has a key that is not a plain word")
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"lines {lines[key.value]} and {line}"
                raise SpecError(f"{path}{key.value}: is written twice, on {where}; one is allowed")
            lines[key.value] = line
            _refuse_twice(value, f"{path}{key.value}.", done, above)
    else:
        for index, item in enumerate(node.value):
            _refuse_twice(item, f"{path.removesuffix('.')}[{index}].", done, above)
    done.add(id(node))
