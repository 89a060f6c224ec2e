"""The native module, and the instruction set that it is to use."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from typing import Any

import torch

NAME = "abq_llm.kernels.cpu._native"


@lru_cache
def module() -> Any:
    """The native module: the installed one, or the file that ABQ_NATIVE_MODULE names.

    Raises:
        ImportError: there is none.
    """
    path = os.environ.get("ABQ_NATIVE_MODULE")
    if not path or NAME in sys.modules:  # it cannot be loaded twice
        return importlib.import_module(NAME)
    spec = importlib.util.spec_from_file_location(NAME, path, loader=ExtensionFileLoader(NAME, path))
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    sys.modules[NAME] = loaded
    return loaded


@torch.compiler.assume_constant_result
def missing() -> str | None:
    """Why the kernels cannot run here, or None."""
    try:
        names = module().levels()
    except ImportError as error:
        return f"its native module is not there ({error}); pip install builds it with any C++17 compiler"
    wanted = os.environ.get("ABQ_CPU_LEVEL")
    if wanted and wanted not in names:
        return f"ABQ_CPU_LEVEL is {wanted!r}, but here are {', '.join(names)}"
    return None


def level() -> str:
    """The instruction set to use: ABQ_CPU_LEVEL, or else the fastest here."""
    return os.environ.get("ABQ_CPU_LEVEL") or _fastest()


@lru_cache
def _fastest() -> str:
    name: str = module().levels()[0]
    return name
