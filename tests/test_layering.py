"""Which module may import what: the rules of the two packages, read from their import statements."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("gateway", "replicas")
    for path in sorted((ROOT / package).rglob("*.py"))
}

PURE = {
    "gateway.errors": set[str](),
    "gateway.bodies": {"orjson"},
    "gateway.openai": set[str](),
    "gateway.routing": set[str](),
    "replicas.autoscaler": set[str](),
    "replicas.breaker": set[str](),
    "replicas.command": set[str](),
    "replicas.document": {"yaml"},  # spec.py's reader
    "replicas.lifecycle": set[str](),
    "replicas.masking": set[str](),
    "replicas.phases": set[str](),
    "replicas.planner": set[str](),
    "replicas.schema": {"pydantic"},  # spec.py's models
    "replicas.spec": {"pydantic"},
}
"""Functions of their arguments, and what each may import beside the standard library and each other."""

IMPURE_STDLIB = {"asyncio", "random", "secrets", "socket", "sqlite3", "subprocess", "threading", "time"}
"""Clocks, chance and the outside world: `now` and `rng` are parameters."""

REQUIRED = {
    "gateway": (
        *("__main__", "admin", "app", "cli", "hold", "metrics", "proxy", "settings", "supervisor"),
        *("upstream", "upstreams"),
    ),
    "replicas": ("board", "control", "controller", "loads", "probe", "provisioners", "simulator", "table"),
    "replicas.provisioners": ("local", "skypilot", "static"),
}


def says_pure(path: Path) -> bool:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.search(r"\bPURE\b", text) is not None


ALL_PURE = {name: set[str]() for name, path in MODULES.items() if says_pure(path)} | PURE
"""Those of the design and whoever else says PURE in its docstring: it is held to it."""


def imports(module: str) -> set[str]:
    """Dotted names of all imports, also of those inside functions; `a.b` for `from a import b`."""
    found: set[str] = set()
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return found


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize(
    "module", [*PURE, *(f"{package}.{name}" for package, names in REQUIRED.items() for name in names)]
)
def test_the_layout_of_the_design_is_there(module: str) -> None:
    assert module in MODULES


def test_replicas_never_imports_gateway() -> None:
    offenders = {
        module: names
        for module in MODULES
        if top(module) == "replicas"
        and (names := {name for name in imports(module) if top(name) == "gateway"})
    }
    assert offenders == {}


@pytest.mark.parametrize("module", [module for module in ALL_PURE if module in MODULES])
def test_a_pure_module_imports_only_the_standard_library_and_pure_modules(module: str) -> None:
    for name in imports(module):
        if top(name) in ("gateway", "replicas"):
            pure = name in ALL_PURE or name.rpartition(".")[0] in ALL_PURE
            assert pure, f"{module} imports {name}"
        else:
            allowed = top(name) in sys.stdlib_module_names or top(name) in ALL_PURE[module]
            assert allowed, f"{module} imports {name}"
            assert top(name) not in IMPURE_STDLIB, f"{module} imports {name}"


def test_only_one_module_imports_sky_and_never_at_import_time() -> None:
    assert [module for module in MODULES if any(top(name) == "sky" for name in imports(module))] in (
        [],
        ["replicas.provisioners.sdk"],
    )
    path = MODULES["replicas.provisioners.sdk"]
    at_import = [
        ast.unparse(node)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        and re.match(r"(import|from) sky\b", ast.unparse(node))
    ]
    assert at_import == []


def test_only_the_table_knows_sqlite() -> None:
    knowing = {module for module in MODULES if "sqlite3" in map(top, imports(module))}
    assert knowing == {"replicas.statefile", "replicas.table"}
    users = {module for module in MODULES if "replicas.statefile" in imports(module)}
    assert users == {"replicas.table"}


@pytest.mark.parametrize("module", ["gateway.app", "gateway.cli", "gateway.supervisor"])
def test_no_worker_has_sky_in_its_modules(module: str, tmp_path: Path) -> None:
    """`import sky` costs seconds and 160 MB, and its SDK blocks: no worker and no CLI may pay for it."""
    code = f"import sys, {module}; print(sorted(m for m in sys.modules if m.partition('.')[0] == 'sky'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
