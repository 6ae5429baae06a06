"""Gets the peers into the cache folder; nothing is installed into the system or started.

nginx and haproxy are unpacked from Debian's packages; the routers come from the package index, each into a
virtual environment of its own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("BENCH_CACHE") or Path.home() / ".cache" / "skygate-bench")
DEBIAN_ROOT = CACHE / "debian" / "root"
DEBIAN = ("nginx", "haproxy")
PYTHON = {
    "sglang-router": "sglang-router==0.3.2",
    "smg": "smg==1.13.0",
    "vllm-router": "vllm-router==0.1.17",
    "skyserve": "skypilot==0.14.1",
}


def venv(name: str) -> Path:
    """Where a peer's virtual environment is, or would be."""
    return CACHE / "venvs" / name


def debian_program(name: str) -> Path | None:
    """The unpacked program, else the system's own, else None."""
    unpacked = DEBIAN_ROOT / "usr" / "sbin" / name
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    return unpacked if unpacked.exists() else Path(found) if found else None


def install(names: list[str]) -> int:
    """Install what is missing of `names` (all, if empty). Returns how many could not be had."""
    failed = 0
    for name in names or [*DEBIAN, *PYTHON]:
        try:
            if name in DEBIAN:
                install_debian(name)
            elif name in PYTHON:
                install_python(name)
            else:
                raise LookupError(f"no such peer; there are {', '.join([*DEBIAN, *PYTHON])}")
        except (subprocess.CalledProcessError, OSError, LookupError) as error:
            failed += 1
            print(f"{name}: NOT installed: {_last_words(error)}", flush=True)
        else:
            print(f"{name}: {version(name)}", flush=True)
    return failed


def install_debian(name: str) -> None:
    """Download the package and those of its libraries that this machine lacks; unpack them all."""
    if debian_program(name):
        return
    folder = DEBIAN_ROOT.parent
    folder.mkdir(parents=True, exist_ok=True)
    listed = _run("apt-cache", "depends", "--no-recommends", "--no-suggests", name)
    if not listed.strip():
        _run("apt-get", "update", "-q")
        listed = _run("apt-cache", "depends", "--no-recommends", "--no-suggests", name)
    libraries = [lib for lib in re.findall(r"Depends: (lib\S+)", listed) if not _has_package(lib)]
    # A library of a library: haproxy's tracing wrapper wants one more.
    for library in list(libraries):
        deeper = re.findall(r"Depends: (lib\S+)", _run("apt-cache", "depends", library))
        libraries += [lib for lib in deeper if lib not in libraries and not _has_package(lib)]
    _run("apt-get", "download", "-q", name, *libraries, cwd=folder)
    for package in folder.glob("*.deb"):
        _run("dpkg-deb", "-x", str(package), str(DEBIAN_ROOT))


def install_python(name: str) -> None:
    """A virtual environment with the pinned package. Raises CalledProcessError."""
    done = venv(name) / ".installed"
    if done.exists() and done.read_text() == PYTHON[name]:
        return
    shutil.rmtree(venv(name), ignore_errors=True)
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv:
        _run(uv, "venv", "-q", "--python", sys.executable, str(venv(name)))
        _run(uv, "pip", "install", "-q", "--python", str(venv(name) / "bin" / "python"), PYTHON[name])
    else:
        _run(sys.executable, "-m", "venv", str(venv(name)))
        _run(str(venv(name) / "bin" / "python"), "-m", "pip", "install", "-q", PYTHON[name])
    done.write_text(PYTHON[name])


def version(name: str) -> str:
    """What is installed, e.g. `nginx 1.22.1`; empty when nothing is."""
    if name in PYTHON:
        return PYTHON[name].replace("==", " ") if (venv(name) / ".installed").exists() else ""
    program = debian_program(name)
    if program is None:
        return ""
    env = {**os.environ, "LD_LIBRARY_PATH": library_path()}
    told = subprocess.run([program, "-v"], capture_output=True, text=True, check=False, env=env)
    found = re.search(r"\d+\.\d+[.\d]*", told.stdout + told.stderr)
    return f"{name} {found[0]}" if found else ""


def library_path() -> str:
    """LD_LIBRARY_PATH for the unpacked programs."""
    return ":".join(map(str, sorted(DEBIAN_ROOT.glob("usr/lib/*-linux-gnu*"))))


def _has_package(name: str) -> bool:
    query = ["dpkg-query", "-W", "-f", "${Status}", name]
    told = subprocess.run(query, capture_output=True, text=True, check=False)
    return "install ok installed" in told.stdout


def _run(*command: str, cwd: Path | None = None) -> str:
    return subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True).stdout


def _last_words(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error)
    return " ".join(text.strip().splitlines()[-2:])
