"""Builds the native module of the CPU backend from the sources as they are, so that no test runs a stale one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / f"native-{sys.implementation.cache_tag}"


def tool(name: str) -> str | None:
    """A program of this environment, or else of the system."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def cmake(build: Path, *options: str) -> None:
    """Configure and build the repository in `build`.

    Raises:
        RuntimeError: with what CMake or the compiler wrote.
    """
    program = tool("cmake")
    if program is None:
        raise RuntimeError("cmake is missing: pip install cmake")
    if ninja := tool("ninja"):
        options = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options)
    for arguments in ([program, "-S", ROOT, "-B", build, *options], [program, "--build", build, "--parallel"]):
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-4000:])


def build_module() -> Path:
    """The native module, compiled if its sources have changed."""
    cmake(BUILD, f"-DPython_EXECUTABLE={sys.executable}")
    (module,) = BUILD.glob("_native*.so")
    return module
