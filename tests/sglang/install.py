"""`python tests/sglang/install.py`: a real SGLang for this machine's CPU, once, outside the checkout.

Into `$SKYGATE_SGLANG`, by default /var/cache/skygate-sglang for root (other users can start it from there,
a Slurm node's among them) and ~/.cache/skygate-sglang for anybody else. Run again, it looks whether all is
there and in the pinned versions, in a second. Exit code 0: it is there; 1: not to be had here, the last line
says why. Only the standard library, any Python >= 3.11.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIMIT = 600  # seconds for all of it
ROOM = 4 << 30  # bytes free: 1.6 GiB installed, and what pip unpacks on the way
PYTHON = (3, 11)  # the one Python for which the index has a wheel of SGLang 0.5.23
GLIBC = (2, 34)  # of that wheel's tag
STAMP = "stamp.json"
LOG = "install.log"
REQUIREMENTS = ("requirements.txt", "requirements-no-deps.txt")
PROBE = """\
import json, sys
from importlib.metadata import version
print(json.dumps([version(name) for name in sys.argv[1:]]))
"""


class NotHere(Exception):
    """This machine cannot have it; the message says why and, where something helps, what."""


def home() -> Path:
    """Where it is, or goes."""
    if given := os.environ.get("SKYGATE_SGLANG"):
        return Path(given).expanduser().resolve()
    if os.geteuid() == 0:
        return Path("/var/cache/skygate-sglang")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skygate-sglang"


def pins() -> dict[str, str]:
    """Version by name, as the requirements have them."""
    lines = "\n".join((HERE / name).read_text() for name in REQUIREMENTS)
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", lines, re.MULTILINE))


def fingerprint() -> str:
    """Of everything that decides what is in the environment."""
    text = "".join((HERE / name).read_text() for name in REQUIREMENTS)
    return hashlib.sha256(f"{text}{PYTHON}{platform.machine()}".encode()).hexdigest()


def fault(place: Path) -> str | None:
    """What is wrong with the installation at `place`; None: it is whole and in the pinned versions."""
    try:
        stamp = json.loads((place / STAMP).read_text())
    except (OSError, ValueError):
        return "not installed"
    if stamp.get("fingerprint") != fingerprint():
        return "installed from other requirements"
    wanted = pins()
    probe = [str(place / "venv/bin/python"), "-I", "-c", PROBE, *wanted]
    try:
        done = subprocess.run(probe, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its Python does not run: {error}"
    if done.returncode != 0:
        return f"incomplete: {done.stderr.strip().splitlines()[-1]}"
    for (name, pin), found in zip(wanted.items(), json.loads(done.stdout), strict=True):
        if found.partition("+")[0] != pin:
            return f"{name} is {found}, not {pin}"
    return None


def python() -> str:
    """A Python for the environment: one that every user can start comes first."""
    names = [os.environ.get("SKYGATE_SGLANG_PYTHON"), "/usr/bin/python3.11", "/usr/local/bin/python3.11"]
    found = [path for name in (*names, "python3.11", sys.executable) if name and (path := shutil.which(name))]
    check = f"import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != {PYTHON})"
    for path in found:
        done = subprocess.run([path, "-c", check], capture_output=True, check=False, timeout=60)
        if done.returncode == 0:
            return path
    raise NotHere("SGLang 0.5.23 has wheels for Python 3.11 only: wanted a python3.11 with venv (Debian 12: "
                  "apt install python3.11-venv), or its path in SKYGATE_SGLANG_PYTHON")  # fmt: skip


def refuse_other_machines(place: Path) -> None:
    """Raises NotHere."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise NotHere(f"SGLang's wheel is for Linux on x86_64, not {sys.platform} on {platform.machine()}")
    library, version = platform.libc_ver()
    if library == "glibc" and tuple(map(int, version.split(".")[:2])) < GLIBC:
        raise NotHere(f"SGLang's wheel wants glibc {'.'.join(map(str, GLIBC))} or newer; this is {version}")
    if (free := shutil.disk_usage(place).free) < ROOM:
        raise NotHere(
            f"{place} has {free >> 20} MiB free; {ROOM >> 20} MiB are needed (SKYGATE_SGLANG moves it)"
        )


class Installation:
    """One installation under way at `place`, to be over at `deadline` (time.monotonic)."""

    def __init__(self, place: Path, deadline: float) -> None:
        self.place = place
        self.deadline = deadline
        self.venv_python = str(place / "venv/bin/python")

    def make(self) -> None:
        """From nothing. Raises NotHere; what is half done then is wiped by the next try."""
        began = time.monotonic()
        (self.place / STAMP).unlink(missing_ok=True)
        for folder in ("venv", "engine", "model"):
            shutil.rmtree(self.place / folder, ignore_errors=True)
        (self.place / LOG).write_text("")
        self.run("a virtual environment", python(), "-m", "venv", str(self.place / "venv"))
        pip = (self.venv_python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input")
        self.run("torch, transformers and the rest", *pip, "-r", str(HERE / REQUIREMENTS[0]))
        self.run("sglang", *pip, "--no-deps", "-r", str(HERE / REQUIREMENTS[1]))
        self.parts()
        parts = self.place / "engine"
        paths = f"import sys; sys.path[:0] = {[str(parts), str(parts / 'stubs')]!r}"
        self.run("a first import", self.venv_python, "-c", f"{paths}; import launch, sglang.launch_server")
        stamp = {
            "fingerprint": fingerprint(),
            "seconds": round(time.monotonic() - began, 1),
            "python": PYTHON,
        }
        fresh = self.place / f"{STAMP}.new"
        fresh.write_text(json.dumps(stamp, indent=1))
        fresh.replace(self.place / STAMP)
        if wrong := fault(self.place):
            raise NotHere(wrong)
        size = sum(path.lstat().st_size for path in self.place.rglob("*")) / 1e9
        print(f"SGLang is installed: {stamp['seconds']:.0f} s, {size:.1f} GB in {self.place}")

    def parts(self) -> None:
        """Our own files beside the environment, as in this checkout, and the model. Raises NotHere."""
        changed = [source for source in sorted((HERE / "engine").rglob("*")) if self.copied(source)]
        if HERE / "engine/model.py" in changed:
            made = str(self.place / "engine/model.py")
            self.run("the model", self.venv_python, made, str(self.place / "model"))

    def copied(self, source: Path) -> bool:
        """Whether it had to be."""
        target = self.place / source.relative_to(HERE)
        if "__pycache__" in source.parts or source.is_dir():
            return False
        if target.exists() and target.read_bytes() == source.read_bytes():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_name(f"{target.name}.new")
        shutil.copy(source, fresh)
        fresh.replace(target)
        return True

    def run(self, what: str, *command: str) -> None:
        """One step, its output in the log. Raises NotHere; a step that lasts too long is ended."""
        print(f"  {what}", flush=True)
        log = self.place / LOG
        with open(log, "ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
            try:
                code = process.wait(max(0.1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise NotHere(f"{what}: not within the time limit; pip's downloads are kept, so a second try "
                              f"goes further (log: {log})") from None  # fmt: skip
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if code != 0:
            lines = log.read_text(errors="replace").splitlines()
            errors = [line for line in lines if "error" in line.lower()]
            raise NotHere(f"{what}: {errors[-1].strip() if errors else f'exit code {code}'} (log: {log})")


@contextmanager
def alone(place: Path, deadline: float) -> Iterator[None]:
    """One installer at a time. Raises NotHere when another one takes too long."""
    with open(place / "lock", "w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NotHere(f"another installation into {place} is still under way") from None
                time.sleep(0.5)  # another process has it
        yield


def install(limit: float) -> Path:
    """See the module. Raises NotHere."""
    place, deadline = home(), time.monotonic() + limit
    os.umask(0o022)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with alone(place, deadline):
            wrong = fault(place)
            if wrong is None:
                Installation(place, deadline).parts()
            else:
                refuse_other_machines(place)
                print(f"SGLang for CPU into {place} ({wrong}); up to {limit / 60:.0f} minutes", flush=True)
                Installation(place, deadline).make()
    except PermissionError as error:
        raise NotHere(f"{error} (SKYGATE_SGLANG moves it)") from None
    return place


def main() -> int:
    flags = argparse.ArgumentParser(prog="install.py", description=(__doc__ or "").partition("\n\n")[0])
    flags.add_argument("--limit", type=float, default=LIMIT, help=f"seconds (default: {LIMIT})")
    options = flags.parse_args()
    try:
        place = install(options.limit)
    except NotHere as error:
        print(f"no SGLang here: {error}", file=sys.stderr)
        return 1
    print(f"SGLang {pins()['sglang']} for CPU: {place}/engine/serve.sh --port PORT")
    return 0


if __name__ == "__main__":
    sys.exit(main())
