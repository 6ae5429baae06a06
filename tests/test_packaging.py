"""What an installed wheel, a checkout and CI rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
# As from a terminal, also when the tests themselves run under make.
SHELL_ENV = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "PYTHON")}
CONFIG = sorted(path.relative_to(ROOT / "config") for path in (ROOT / "config").rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("skygate-*.whl")
    return path


def test_the_wheel_ships_both_packages_and_the_config(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gateway/__init__.py", "gateway/py.typed", "replicas/__init__.py", "replicas/py.typed"} <= names
    assert {f"gateway/_config/{path}" for path in CONFIG} <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"gateway", "replicas"}


def test_an_installed_wheel_finds_its_config_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    zipfile.ZipFile(wheel).extractall(installed)
    empty.mkdir()
    code = "from gateway.settings import find_config; print(find_config('local.yaml'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=empty,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(installed / "gateway/_config/local.yaml"), done.stderr


def test_what_is_compiled_is_there_and_by_the_locked_mypy(project: dict[str, Any]) -> None:
    hook = project["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]
    assert hook["enable-by-default"] is False
    for module in hook["modules"]:
        path = ROOT / (module.replace(".", "/") + ".py")
        assert path.exists(), module
        assert '__name__ == "__main__"' not in path.read_text(), f"`python -m {module}` needs its source"
    lock = (ROOT / "requirements.lock").read_text()
    for pin in (f"{name}==" for name in ("mypy", "setuptools", "types-pyyaml")):
        assert f"\n{pin}" in lock
    (mypy,) = [wanted for wanted in hook["dependencies"] if wanted.startswith("mypy==")]
    assert f"\n{mypy} " in lock


def test_the_lock_has_every_dependency_with_hashes_and_no_download_address(project: dict[str, Any]) -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "uv pip compile --universal --generate-hashes" in lock.splitlines()[1]
    assert not re.search(r"https?://|^--(index|extra-index|find-links)", lock, re.MULTILINE)
    pins = set(re.findall(r"^([A-Za-z0-9._-]+)==", lock, re.MULTILINE))
    extras = project["project"]["optional-dependencies"]
    for wanted in (*project["project"]["dependencies"], *extras["test"], *extras["dev"]):
        name = re.match(r"[A-Za-z0-9._-]+", wanted)
        assert name
        assert name[0].lower() in pins, wanted
    for block in re.split(r"\n(?=\S)", lock):
        assert block.startswith("#") or "--hash=sha256:" in block, block


def test_extras_pass_on_to_skypilots_own(project: dict[str, Any]) -> None:
    extras = project["project"]["optional-dependencies"]
    for cloud in ("aws", "gcp", "azure", "kubernetes", "lambda", "runpod", "nebius", "all"):
        assert extras[cloud] == [f"skypilot[{cloud}]==0.14.1"]


def test_ci_and_pre_commit_run_the_same_commands() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in ci
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == re.findall(r"^make .*", ci, re.MULTILINE)


def run_ci(
    folder: Path, *, bed: str = "exit 0", python: str = '[ "$1" = -c ]', make_fails_at: str = "",
    apt: str = "false",
) -> tuple[int, list[str], str]:  # fmt: skip
    """Its exit code, what was made, and what it said. By default no SGLang; `python -c` finds the headers."""
    for path, text in {
        ".ci/run": (ROOT / ".ci" / "run").read_text(),
        "tests/e2e/sky/bed.sh": f"#!/bin/sh\n{bed}\n",
        ".venv/bin/python": f"#!/bin/sh\n{python}\n",
        "bin/make": f'#!/bin/sh\necho "$1" >>made\n[ "$1" != "{make_fails_at}" ] || exit 2\n',
        "bin/cc": "#!/bin/sh\n",
        "bin/apt-get": f"#!/bin/sh\n{apt}\n",
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
        (folder / path).chmod(0o755)
    env = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run([folder / ".ci" / "run"], env=env, capture_output=True, text=True, timeout=20)
    return done.returncode, (folder / "made").read_text().split(), done.stdout


@pytest.mark.parametrize(
    ("possible", "make_fails_at", "code", "made"),
    [
        ("exit 0", "", 0, ["lint", "test", "test-compiled", "test-sky"]),
        # A bed that is possible must work.
        ("exit 0", "test-sky", 2, ["lint", "test", "test-compiled", "test-sky"]),
        ("echo missing: root; exit 1", "", 0, ["lint", "test", "test-compiled"]),
        ("exit 0", "test", 2, ["lint", "test"]),
    ],
)
def test_ci_runs_the_bed_where_it_is_possible_and_says_so_where_it_is_not(
    tmp_path: Path, possible: str, make_fails_at: str, code: int, made: list[str]
) -> None:
    *done, said = run_ci(tmp_path, bed=possible, make_fails_at=make_fails_at)
    assert done == [code, made]
    assert ("NOT RUN" in said and "missing: root" in said) == ("missing" in possible)


@pytest.mark.parametrize(
    ("apt", "made"),
    [("false", []), ('[ "$2" = update ] || touch headers', ["test-compiled"])],
)
def test_ci_installs_what_compiling_takes_and_says_so_where_it_cannot(
    tmp_path: Path, apt: str, made: list[str]
) -> None:
    code, tried, said = run_ci(tmp_path, python='[ "$1" = -c ] && [ -e headers ]', apt=apt)
    assert (code, tried) == (0, ["lint", "test", *made, "test-sky"])
    assert ("NOT RUN: make test-compiled" in said) == (not made)


def test_ci_stops_where_the_compiled_build_fails(tmp_path: Path) -> None:
    code, tried, _ = run_ci(tmp_path, make_fails_at="test-compiled")
    assert (code, tried) == (2, ["lint", "test", "test-compiled"])


def test_the_bed_tells_a_user_who_is_not_root_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "BED": str(tmp_path / "bed")}
    bed = ROOT / "tests" / "e2e" / "sky" / "bed.sh"
    done = subprocess.run([bed, "possible"], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "missing: root" in done.stdout
    done = subprocess.run([bed, "test"], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1
    assert "missing: root" in done.stderr
    assert not (tmp_path / "bed").exists()


def test_make_without_a_target_says_what_there_is() -> None:
    done = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()] == [
        *("help", "venv", "demo", "test", "test-compiled", "test-sky", "test-sglang", "chaos", "lint"),
        *("check", "docs", "lock", "wheel", "wheel-compiled", "compiled", "bench", "bench-peers"),
    ]


def test_make_refuses_an_old_python_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (copy / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["make", "--no-print-directory", "venv", f"PYTHON={old}"],
        cwd=copy,
        env=SHELL_ENV,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert done.stderr.startswith("Python 3.11 or newer is needed;")
    assert not (copy / ".venv").exists()


def test_the_image_runs_the_same_entry_point_as_another_user() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    assert 'ENTRYPOINT ["gateway"]' in lines
    assert "USER gateway" in lines
    assert any("--require-hashes -r requirements.lock" in line for line in lines)
    assert any("GATEWAY_HOST=0.0.0.0" in line for line in lines)
    assert any({"openssh-client", "rsync", "netcat-openbsd", "socat"} <= set(line.split()) for line in lines)


def test_the_image_is_compiled_where_its_user_cannot_write() -> None:
    build, _, run = (ROOT / "Dockerfile").read_text().partition("FROM python:3.12-slim\n")
    compiled = build.index("ENV UV_COMPILE_BYTECODE=1")
    assert compiled < build.index("uv pip install")
    assert "pip install" not in run  # or what it installs would be compiled at each start


def test_the_images_health_check_is_a_command_that_parses() -> None:
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", "")
    found = re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", text, re.MULTILINE)
    assert found
    python, flag, code = json.loads(found[1])
    assert (python, flag) == ("python", "-c")
    compile(code, "Dockerfile", "exec")
    assert "/health" in code
