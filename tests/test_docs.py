"""The README says what the code says. `python tests/test_docs.py` (make docs) renews its generated parts."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from gateway import cli, errors, metrics
from gateway.settings import SETTINGS
from replicas import lifecycle

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def settings_table() -> str:
    rows = [
        (
            f"`{row.option}{f' {row.metavar}' if row.metavar else ''}`",
            _default(row.default),
            row.sentence,
            row.env,
        )
        for row in SETTINGS
    ]
    return _table(
        ("flag", "default", "what", "variable"),
        [(flag, default, sentence, f"`{env}`") for flag, default, sentence, env in rows],
    )


def metrics_table() -> str:
    rows = []
    for family in metrics.FAMILIES:
        (described,) = family.describe()
        name = f"{described.name}_total" if described.type == "counter" else described.name
        rows.append((name, described.type, family._labelnames, described.documentation))
    rows += [(name, kind, labels, text) for name, (kind, text, labels) in metrics.LEVELS.items()]
    return _table(
        ("metric", "kind", "labels", "what"),
        [
            (f"`{name}`", kind, " ".join(f"`{label}`" for label in labels), text)
            for name, kind, labels, text in sorted(rows)
        ],
    )


def errors_table() -> str:
    found = sorted(_subclasses(errors.GatewayError), key=lambda error: (error.status, error.code))
    seen: dict[str, type[errors.GatewayError]] = {}
    for error in found:
        if "code" in vars(error) or error is errors.InternalError:
            seen.setdefault(error.code, error)
    return _table(
        ("status", "code", "when"),
        [
            (str(error.status), f"`{code}`", (error.__doc__ or "").split("\n\n")[0].replace("\n    ", " "))
            for code, error in seen.items()
        ],
    )


def lifecycle_diagram() -> str:
    return f"```mermaid\n{lifecycle.diagram()}\n```"


GENERATED = {
    "settings": settings_table,
    "metrics": metrics_table,
    "errors": errors_table,
    "lifecycle": lifecycle_diagram,
}


def renewed(text: str) -> str:
    for name, make in GENERATED.items():
        begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        _, marker, after = rest.partition(end)
        assert marker, f"README.md has no {begin.strip()} ... {end}"
        text = f"{before}{begin}{make()}\n{marker}{after}"
    return text


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _default(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def _subclasses(base: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    for error in base.__subclasses__():
        yield error
        yield from _subclasses(error)


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


@pytest.mark.parametrize("part", GENERATED)
def test_a_generated_part_of_the_readme_is_what_the_code_says(part: str, readme: str) -> None:
    held = readme.partition(f"<!-- {part}:begin -->\n")[2].partition(f"\n<!-- {part}:end -->")[0]
    assert held == GENERATED[part](), "run: make docs"


def test_a_command_line_of_up_in_the_readme_can_be_given_to_check(readme: str) -> None:
    text = readme.replace("\\\n", " ")
    found = re.findall(r"^gateway (?:up|check) (?=\S+\.yaml)(.*)$", text, re.MULTILINE)
    assert len(found) >= 6
    for line in found:
        with cli.check.make_context("check", shlex.split(line, comments=True)) as context:
            assert context.params["file"].endswith(".yaml"), line


def test_every_metric_named_in_prose_exists(readme: str) -> None:
    tables = metrics_table() + errors_table()  # an error's code may begin like a metric
    assert {name for name in re.findall(r"`(gateway_\w+)", readme) if f"`{name}`" not in tables} == set()


def test_every_end_of_a_request_is_explained(readme: str) -> None:
    paragraph = readme.partition("Ends of a request")[2].partition("##")[0]
    assert {end.value for end in errors.End} <= set(re.findall(r"`(\w+)`", paragraph))


def test_every_variable_named_exists(readme: str) -> None:
    assert set(re.findall(r"GATEWAY_[A-Z_]+", readme)) <= {row.env for row in SETTINGS}


def test_every_flag_named_in_prose_exists(readme: str) -> None:
    known = {row.option for row in SETTINGS} | set(_command_options()) | {"--version"}
    known |= {
        "--api-key",
        "--enable-metrics",
        "--max-queued-requests",
        "--reasoning-parser",
        "--host",
        "--ssl-keyfile",
        "--ssl-certfile",
    }  # SGLang's
    known.add("--priority")  # the benchmark's
    prose = re.sub(r"```.*?```", "", readme, flags=re.DOTALL).replace("`--timeout=4000s`", "")  # gcloud's
    assert {flag for flag in re.findall(r"`[^`\n]*?(--[a-z-]+)", prose) if flag not in known} == set()


def test_the_commands_are_those_of_the_program(readme: str) -> None:
    from gateway.cli import main

    assert isinstance(main, click.Group)
    table = readme.partition("## Commands")[2].partition("## ")[0]
    assert set(re.findall(r"^\| `gateway (\w+)", table, re.MULTILINE)) == set(main.commands)


def test_every_file_linked_exists(readme: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_every_section_linked_exists(readme: str) -> None:
    heads = {
        re.sub(r"[^\w -]", "", head).lower().replace(" ", "-")
        for head in re.findall(r"^#+ (.*)$", readme, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", readme)) <= heads


def test_the_recipes_own_request_is_the_one_of_skypilots_readme(readme: str) -> None:
    assert '"model": "deepseek-ai/DeepSeek-R1-671B"' in readme
    assert "how many rs are in strawberry" in readme


def _command_options() -> Iterator[str]:
    from gateway.cli import main

    assert isinstance(main, click.Group)
    for command in main.commands.values():
        for parameter in command.params:
            yield from (*parameter.opts, *parameter.secondary_opts)


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
