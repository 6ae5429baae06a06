"""Compiles the modules of `[tool.hatch.build.targets.wheel.hooks.custom]` with mypyc, into a wheel for this
platform and Python. Off by default: HATCH_BUILD_HOOK_ENABLE_CUSTOM=true asks for it (`make wheel-compiled`).

Their sources stay beside them: a Python that cannot load the compiled ones imports those.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# In a process and folder of its own: mypyc reads the folder's pyproject.toml, and writes beside the sources.
_COMPILE = """
import sys
from mypyc.build import mypycify
from setuptools import setup
setup(
    name="skygate", version="0", packages=[], script_args=["-q", "build_ext", "--inplace"],
    ext_modules=mypycify(sys.argv[1:], opt_level="3", group_name="skygate"),
)
"""


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Mutable: the folder of the build, between `initialize` and `finalize`."""

    _folder: str | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the compiled modules to the wheel. An editable install stays as it is."""
        if version == "editable":
            return
        self._folder = tempfile.mkdtemp(prefix="skygate-compile-")
        folder, root = Path(self._folder), Path(self.root)
        for package in ("gateway", "replicas"):
            sources = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(root / package, folder / package, ignore=sources)
        project = (root / "pyproject.toml").read_text().partition("[tool.mypy]")
        (folder / "pyproject.toml").write_text(project[1] + project[2])
        paths = [module.replace(".", "/") + ".py" for module in self.config["modules"]]
        self.app.display_waiting(f"Compiling {len(paths)} modules")
        done = subprocess.run([sys.executable, "-c", _COMPILE, *paths], cwd=folder, check=False)
        if done.returncode != 0:
            raise SystemExit(
                "The modules could not be compiled: the reason is above. It takes a C compiler, Python's "
                "headers (Debian: gcc, python3-dev) and the packages of requirements.lock."
            )
        for made in folder.glob("*.so"), folder.glob("gateway/*.so"), folder.glob("replicas/*.so"):
            for path in made:
                build_data["force_include"][str(path)] = str(path.relative_to(folder))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the folder of the build."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
