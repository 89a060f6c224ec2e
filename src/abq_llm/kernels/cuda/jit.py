"""Kernel sources -> machine code -> a loaded kernel. Compiling needs NVRTC, but neither a GPU nor a driver.

A kernel is `template <class C> __global__ void name(...)` in `src/<stem>.cuh`. The compile-time constants that the host
wants are appended to the source as `struct Config {...}`, and `name<Config>` is instantiated.

Machine code is kept on disk under a hash of everything that it depends on, in entries that carry their own checksum:
one that does not verify is compiled again and replaced.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import driver

SOURCES = Path(__file__).parent / "src"
STANDARD = "c++17"
NVRTC_WHEELS = "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"
MAGIC = b"abq kernel 1\n"  # the version of the entries' format; it is part of the key, too

Constants = Mapping[str, bool | int | str]

_lock = threading.Lock()
_compiled: dict[str, tuple[bytes, str]] = {}  # by cache key
_loaded: dict[tuple[str, str, str, str], Kernel] = {}  # by stem, template, Config, arch


@dataclass(frozen=True, eq=False, slots=True)
class Kernel:
    """A kernel that the driver has loaded. It may be launched on every GPU of its architecture."""

    name: str  # "gemm_mma<planes=2, grouped=false>": for messages
    handle: int  # CUkernel
    programmatic: bool  # whether the architecture has programmatic dependent launch
    shared_limit: dict[int, int] = field(default_factory=dict)  # device index -> bytes allowed so far

    def allow_shared(self, shared_bytes: int, index: int) -> None:
        """Let a block on device `index` have that much dynamic shared memory."""
        if shared_bytes <= self.shared_limit.get(index, 0):
            return
        with _lock:
            if shared_bytes > self.shared_limit.get(index, 0):
                driver.set_shared_limit(self.handle, index, shared_bytes, self.name)
                self.shared_limit[index] = shared_bytes


def arch_of(device: torch.device) -> str:
    """The architecture to compile for; from sm_90 on its "a" variant, which has instructions of its own (wgmma)."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise AbqError(f"{device} has compute capability {major}.{minor}; the CUDA kernels need 8.0 or newer")
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def load(stem: str, name: str, constants: Constants, device: torch.device) -> Kernel:
    """The kernel `name<Config>` of `src/<stem>.cuh` for `device`. Costs microseconds after the first time."""
    arch = arch_of(device)
    key = stem, name, config_struct(constants), arch
    if key in _loaded:
        return _loaded[key]
    cubin, mangled_name = compile_cubin(stem, name, constants, arch)
    with _lock:
        if key not in _loaded:
            described = _describe(name, constants)
            handle = driver.load_kernel(cubin, mangled_name, f"{described} for {arch}")
            _loaded[key] = Kernel(described, handle, programmatic=not arch.startswith("sm_8"))
        return _loaded[key]


def compile_cubin(stem: str, name: str, constants: Constants, arch: str) -> tuple[bytes, str]:
    """(cubin, mangled name) of `name<Config>` of `src/<stem>.cuh`, from the cache or from NVRTC."""
    source = f"{read_source(f'{stem}.cuh')}\n{config_struct(constants)}"
    expression = f"{name}<Config>"
    key = _key(source, expression, arch)
    if key in _compiled:
        return _compiled[key]
    compiled = _read(key)
    if compiled is None:
        try:
            compiled = _nvrtc(source, expression, arch)
        except AbqError as error:
            raise AbqError(
                f"kernel {_describe(name, constants)} of {stem}.cuh does not compile for {arch}: {error}"
            ) from error.__cause__
        _write(key, *compiled)
    _compiled[key] = compiled
    return compiled


# --- source ---


def read_source(file_name: str) -> str:
    """The text of a file in `src/`, each `#include "..."` replaced by the file it names (every file once)."""
    seen: set[str] = set()

    def inline(current: str, included_by: str) -> str:
        seen.add(current)
        try:
            text = (SOURCES / current).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise AbqError(f"no kernel source {current}{included_by} in {SOURCES}") from None
        lines = [f'#line 1 "{current}"']
        for number, line in enumerate(text.splitlines(), 1):
            if match := re.match(r'\s*#\s*include\s*"(.+?)"', line):
                if match[1] not in seen:
                    lines.append(inline(match[1], f", included by {current}:{number},"))
                lines.append(f'#line {number + 1} "{current}"')
            else:
                lines.append("" if re.match(r"\s*#\s*pragma\s+once\b", line) else line)
        return "\n".join(lines)

    return inline(file_name, "")


def config_struct(constants: Constants) -> str:
    """{"planes": 2, "grouped": False, "T": "half_t"} -> a C++ struct that has them as members, sorted by name."""

    def member(name: str, value: bool | int | str) -> str:
        if isinstance(value, str):
            return f"using {name} = {value};"
        if isinstance(value, bool):
            return f"static constexpr bool {name} = {str(value).lower()};"
        return f"static constexpr int {name} = {value};"

    return f"struct Config {{ {' '.join(member(*item) for item in sorted(constants.items()))} }};"


def _describe(name: str, constants: Constants) -> str:
    values = (f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in constants.items())
    return f"{name}<{', '.join(values)}>"


# --- compiler ---


def _nvrtc(source: str, expression: str, arch: str) -> tuple[bytes, str]:
    """(cubin, mangled name of `expression`)."""
    try:
        from cuda.bindings import nvrtc
        from cuda.core import Program, ProgramOptions

        nvrtc.nvrtcVersion()  # finds the library, or raises
    except (ImportError, RuntimeError) as error:
        raise _no_compiler(error) from error
    try:
        program = Program(source, "c++", ProgramOptions(std=STANDARD, arch=arch))
        compiled = program.compile("cubin", name_expressions=(expression,))
    except Exception as error:  # cuda.core's exceptions have no public base class
        lines = [line.strip() for line in str(error).splitlines()]
        first = [line for line in lines if re.search(r"\berror\s*:", line)] or lines
        raise AbqError("; ".join(first[:3])) from error
    return compiled.code, compiled.symbol_mapping[expression].decode()


@functools.cache
def compiler_version() -> str:
    """What tells one compiler from another, in milliseconds: neither is imported before there is something to compile.

    NVRTC comes from its wheel if there is one; else it is known by its file, whose version has no patch level.
    """
    try:
        names = "cuda-core", *(name for name in NVRTC_WHEELS if _is_installed(name))
        known = ", ".join(f"{name} {version(name)}" for name in names)
        if len(names) > 1:
            return known
        from cuda.pathfinder import load_nvidia_dynamic_lib  # this import takes longer than everything else here

        library = os.stat(load_nvidia_dynamic_lib("nvrtc").abs_path)
    except (ImportError, RuntimeError) as error:
        raise _no_compiler(error) from error
    return f"{known}, NVRTC of {library.st_size} bytes, {library.st_mtime_ns}"


def _is_installed(wheel: str) -> bool:
    try:
        return bool(version(wheel))
    except PackageNotFoundError:
        return False


def _no_compiler(error: Exception) -> AbqError:
    return AbqError(f"the CUDA backend needs a compiler: pip install 'abq-llm[cuda]' ({error})")


# --- cache ---


def _key(source: str, expression: str, arch: str) -> str:
    facts = (source, expression, arch, STANDARD, compiler_version(), MAGIC.decode())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def cache_directory() -> Path:
    if directory := os.environ.get("ABQ_CACHE_DIR"):
        return Path(directory) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "abq-llm" / "kernels"


def _seal(key: str, payload: bytes) -> bytes:
    """The checksum covers the key: an entry under another entry's name is no more trusted than a damaged one."""
    return MAGIC + hashlib.sha256(key.encode() + payload).digest()


def _read(key: str) -> tuple[bytes, str] | None:
    """An entry is MAGIC, a SHA-256, the mangled name, a zero byte, the cubin. None if there is none, or a bad one."""
    try:
        entry = (cache_directory() / key).read_bytes()
    except (OSError, RuntimeError):  # Path.home() raises the latter
        return None
    header = len(_seal(key, b""))
    if entry[:header] != _seal(key, entry[header:]):
        return None
    mangled_name, _, cubin = entry[header:].partition(b"\0")
    return cubin, mangled_name.decode()


def _write(key: str, cubin: bytes, mangled_name: str) -> None:
    """Write aside and rename, so that another process reads all of an entry or nothing."""
    payload = mangled_name.encode() + b"\0" + cubin
    try:
        directory = cache_directory()
        directory.mkdir(parents=True, exist_ok=True)
        aside = directory / f".{key}.{os.getpid()}.{secrets.token_hex(4)}"
        try:
            aside.write_bytes(_seal(key, payload) + payload)
            aside.replace(directory / key)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        _warn_uncached(str(error))


@functools.cache
def _warn_uncached(reason: str) -> None:
    warnings.warn(f"compiled kernels are not kept between processes: {reason}", RuntimeWarning, stacklevel=2)
