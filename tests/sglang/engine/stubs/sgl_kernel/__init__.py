"""Stands in for SGLang's kernel package, of which the index has no CPU build: every name can be imported,
every call raises. With no operator registered SGLang falls back to plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

__version__ = "0+stub"


def _missing(name: str) -> Callable[..., NoReturn]:
    def call(*_args: object, **_kwargs: object) -> NoReturn:
        raise NotImplementedError(f"{name} is a kernel that this CPU build of SGLang does not have")

    call.__name__ = name
    return call


copy_all_layer_kv_cache_cpu = _missing("copy_all_layer_kv_cache_cpu")


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(name)
