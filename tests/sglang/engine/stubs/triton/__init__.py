"""Stands in for triton (1 GB), which SGLang imports at its top level and never launches on a CPU.

Every submodule and every name can be imported; decorators return what they decorate; asking for a driver
raises, as triton does on a machine without a GPU.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

__version__ = "3.9.0"

_CLASSES = (
    *("constexpr", "dtype", "tensor", "JITFunction", "KernelInterface", "GPUTarget", "CompiledKernel"),
    *("Autotuner", "Heuristics"),
)
_ERRORS = ("OutOfResources", "PTXASError", "CompilationError")
_SUBMODULES = ("language", "runtime", "compiler", "backends", "testing", "tools")


class _Anything:
    """Called, indexed or asked for an attribute it gives itself; as a decorator it gives the function."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __getitem__(self, _key: object) -> Any:
        return _Anything()

    def __or__(self, _other: object) -> Any:
        return self

    __ror__ = __or__


def _decorator(*args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and callable(args[0]) and not kwargs:
        return args[0]
    return lambda function: function


jit = autotune = heuristics = _decorator


class Config(_Anything):
    """Of an autotuner that never runs."""


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (int(n) - 1).bit_length() if n > 0 else 1


class _NoDriver:
    def __getattr__(self, _name: str) -> Any:
        raise RuntimeError("0 active drivers: triton is a stub here")


class _Submodule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "driver":
            return _NoDriver()
        if name in ("jit", "builtin", "extern", "autotune"):
            return _decorator
        if name in _CLASSES:
            return type(name, (_Anything,), {})
        return type(name, (Exception,), {}) if name in _ERRORS else _Anything()


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return importlib.import_module(f"triton.{name}") if name in _SUBMODULES else _Anything()


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, _path: Any, _target: Any = None) -> Any:
        if fullname.startswith("triton."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Submodule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


sys.meta_path.insert(0, _Finder())
