"""SkyPilot's own exceptions, without the 4 s and 160 MB of `import sky`."""
from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

_USED = ("sky", "sky.backends", "sky.backends.backend", "sky.utils")


@cache
def real_exceptions() -> Any:
    """The installed `sky/exceptions.py`, run alone; what it imports serves annotations and serialising."""
    package = importlib.util.find_spec("sky")
    assert package
    assert package.origin
    path = Path(package.origin).parent / "exceptions.py"
    spec = importlib.util.spec_from_file_location("sky.exceptions", path)
    assert spec
    assert spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    utils = MagicMock()
    utils.env_options.Options.SHOW_DEBUG_INFO.get.return_value = False   # as it is for everybody
    stubs = {name: MagicMock() for name in _USED} | {"sky.utils": utils}
    with patch.dict(sys.modules, stubs):
        spec.loader.exec_module(module)
    return module
