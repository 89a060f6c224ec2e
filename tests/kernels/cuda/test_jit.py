"""Compiling, the cache of cubins and loading. None of it needs a GPU; the driver is a fake."""

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import driver, jit
from tests.kernels.cuda.sass import sass

HELPER = """#pragma once
__device__ inline int add(int a, int b) { return a + b; }
"""
KERNEL = """#include "helper.cuh"
#include "helper.cuh"
template <class C> __global__ void tiny(int* out) { out[threadIdx.x] = add(out[threadIdx.x], C::amount); }
"""
TINY = ("tiny", "tiny", {"amount": 3}, "sm_80")
SOURCES = jit.SOURCES


@pytest.fixture(autouse=True)
def _fresh(tmp_path, monkeypatch):
    """A source folder and a cache of one's own, and a process that has compiled nothing."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "helper.cuh").write_text(HELPER)
    (tmp_path / "src" / "tiny.cuh").write_text(KERNEL)
    monkeypatch.setattr(jit, "SOURCES", tmp_path / "src")
    monkeypatch.setenv("ABQ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "_loaded", {})
    jit._warn_uncached.cache_clear()
    forget(monkeypatch)


def forget(monkeypatch):
    monkeypatch.setattr(jit, "_compiled", {})


def entries(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "cache" / "kernels").iterdir())


@pytest.fixture
def compilations(monkeypatch):
    """The architectures NVRTC was asked for."""
    calls = []

    def counted(source, expression, arch, nvrtc=jit._nvrtc):
        calls.append(arch)
        return nvrtc(source, expression, arch)

    monkeypatch.setattr(jit, "_nvrtc", counted)
    return calls


# --- cache ---


def test_cache_returns_what_was_compiled(monkeypatch, tmp_path, compilations):
    cubin, name = jit.compile_cubin(*TINY)
    assert cubin.startswith(b"\x7fELF") and name in sass(cubin)
    assert jit.compile_cubin(*TINY) == (cubin, name) and len(compilations) == 1  # from memory
    forget(monkeypatch)
    assert jit.compile_cubin(*TINY) == (cubin, name) and len(compilations) == 1  # from disk
    (entry,) = entries(tmp_path)
    forget(monkeypatch)
    entry.unlink()
    assert jit.compile_cubin(*TINY) == (cubin, name) and len(compilations) == 2  # NVRTC is deterministic


def flip(position):
    def damage(entry: bytes) -> bytes:
        at = position % len(entry)
        return entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[:20],  # inside the checksum
        lambda entry: entry[:-1],
        lambda entry: entry + b"\0",
        lambda entry: b"\x7fELF" + bytes(1000),
        flip(0),  # magic
        flip(20),  # checksum
        flip(len(jit.MAGIC) + 32 + 2),  # mangled name
        flip(-1),  # cubin
        "another kernel's entry",
    ],
)
def test_bad_entry_is_compiled_again(damage, monkeypatch, tmp_path, compilations):
    expected = jit.compile_cubin(*TINY)
    (entry,) = entries(tmp_path)
    good = entry.read_bytes()
    if callable(damage):
        entry.write_bytes(damage(good))
    else:
        jit.compile_cubin("tiny", "tiny", {"amount": 4}, "sm_80")
        (other,) = set(entries(tmp_path)) - {entry}
        entry.write_bytes(other.read_bytes())
    forget(monkeypatch)
    compilations.clear()
    assert jit.compile_cubin(*TINY) == expected and compilations == ["sm_80"]
    assert entry.read_bytes() == good


def test_key_depends_on_everything(monkeypatch, tmp_path, compilations):
    def compile_again(constants=TINY[2], arch="sm_80") -> int:
        """The number of entries after it."""
        forget(monkeypatch)
        jit.compile_cubin("tiny", "tiny", constants, arch)
        return len(entries(tmp_path))

    assert compile_again() == 1
    assert compile_again() == 1
    assert compile_again({"amount": 1}) == 2
    assert compile_again({"amount": True}) == 3  # equal to 1 in Python, not in C++
    assert compile_again({"amount": 3, "more": 1}) == 4
    assert compile_again({"more": 1, "amount": 3}) == 4  # the order of the constants does not matter
    assert compile_again(arch="sm_86") == 5
    (tmp_path / "src" / "helper.cuh").write_text(HELPER.replace("a + b", "a - b"))
    assert compile_again() == 6
    monkeypatch.setattr(jit, "compiler_version", lambda: "NVRTC V13.99.1")
    assert compile_again() == 7
    monkeypatch.setattr(jit, "MAGIC", b"abq kernel 2\n")
    assert compile_again() == 8
    monkeypatch.setattr(jit, "STANDARD", "c++20")
    assert compile_again() == 9


def test_two_processes_compile_the_same_kernel(tmp_path, compilations):
    program = (
        "import sys\nfrom pathlib import Path\nfrom abq_llm.kernels.cuda import jit\n"
        f"jit.SOURCES = Path({str(jit.SOURCES)!r})\njit.compiler_version()\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"print(*jit.compile_cubin(*{TINY!r}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "error::RuntimeWarning"}
    command = [sys.executable, "-c", program]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert other.stdout.readline() == "ready\n"
    other.stdin.write("go\n")
    other.stdin.flush()
    cubin, name = jit.compile_cubin(*TINY)  # at the same time
    output, _ = other.communicate(timeout=60)
    assert other.returncode == 0 and output == f"{cubin} {name}\n"
    assert len(entries(tmp_path)) == 1  # and nothing left aside


def test_unwritable_cache_warns_once(monkeypatch, tmp_path, compilations):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ABQ_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="not kept between processes: .*file"):
        cubin, _ = jit.compile_cubin(*TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.compile_cubin("tiny", "tiny", {"amount": 4}, "sm_80")[0] != cubin
        assert jit.compile_cubin(*TINY)[0] == cubin and len(compilations) == 2


def test_failed_write_leaves_nothing_aside(tmp_path, monkeypatch):
    jit.compile_cubin(*TINY)
    (entry,) = entries(tmp_path)
    entry.unlink()
    entry.mkdir()  # a file cannot replace it
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning):
        jit.compile_cubin(*TINY)
    assert entries(tmp_path) == [entry]


def test_cache_directory(monkeypatch, tmp_path):
    assert jit.cache_directory() == tmp_path / "cache" / "kernels"
    monkeypatch.setenv("ABQ_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert jit.cache_directory() == Path("/xdg/abq-llm/kernels")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert jit.cache_directory() == Path("/home/somebody/.cache/abq-llm/kernels")


# --- source and compiler ---


def test_config_struct():
    constants = {"planes": 2, "grouped": False, "T": "half_t", "bias": -1}
    assert jit.config_struct(constants) == (
        "struct Config { using T = half_t; static constexpr int bias = -1; "
        "static constexpr bool grouped = false; static constexpr int planes = 2; };"
    )


def test_every_file_is_included_once():
    text = jit.read_source("tiny.cuh")
    assert text.count("int add(") == 1 and "#include" not in text and "#pragma" not in text


def test_missing_include_is_named(tmp_path):
    (tmp_path / "src" / "tiny.cuh").write_text('\n#include "nowhere.cuh"\n')
    with pytest.raises(AbqError, match=r"nowhere\.cuh, included by tiny\.cuh:2, in .*src"):
        jit.compile_cubin(*TINY)


@pytest.mark.parametrize(("file", "line"), [("helper.cuh", 4), ("tiny.cuh", 5)])
def test_compile_error_names_kernel_and_line(file, line, tmp_path):
    path = tmp_path / "src" / file
    path.write_text(f"{path.read_text()}\nint * oops(;\n".replace("\n\n", "\n" * (line - path.read_text().count("\n"))))
    with pytest.raises(AbqError) as caught:
        jit.compile_cubin("tiny", "tiny", {"amount": 3, "grouped": True}, "sm_90a")
    message = str(caught.value)
    assert message.startswith("kernel tiny<amount=3, grouped=true> of tiny.cuh does not compile for sm_90a: ")
    assert f"sm_90a: {file}({line}): error: " in message and "\n" not in message
    assert "^" in str(caught.value.__cause__)  # the whole log


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings"])
def test_missing_compiler_says_what_to_install(module, monkeypatch):
    jit.compiler_version.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(AbqError, match=r"pip install 'abq-llm\[cuda\]'"):
        jit.compile_cubin(*TINY)


@pytest.fixture
def wheels(monkeypatch):
    """The wheels that are installed, by name."""
    installed = {"cuda-core": "1.2.2"}

    def version(name):
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(jit, "version", version)
    jit.compiler_version.cache_clear()
    yield installed
    jit.compiler_version.cache_clear()


def test_compiler_version_is_that_of_its_wheel(wheels, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)  # its import would be most of a process's first call
    wheels["nvidia-cuda-nvrtc"] = "13.5.37"
    assert jit.compiler_version() == "cuda-core 1.2.2, nvidia-cuda-nvrtc 13.5.37"


def test_compiler_version_changes_with_the_library(wheels, tmp_path, monkeypatch):
    from cuda import pathfinder

    library = tmp_path / "libnvrtc.so.13"
    found = SimpleNamespace(abs_path=str(library))
    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", {"nvrtc": found}.__getitem__)
    versions = set()
    for content, seconds in (("a", 1), ("ab", 1), ("ab", 2)):
        library.write_text(content)
        os.utime(library, (seconds, seconds))
        jit.compiler_version.cache_clear()
        versions.add(jit.compiler_version())
    assert len(versions) == 3


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100a"),
        ((10, 3), "sm_103a"),
        ((12, 0), "sm_120a"),
    ],
)
def test_arch_of(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert jit.arch_of(torch.device("cuda", 1)) == arch
    assert jit.compile_cubin("tiny", "tiny", {"amount": 3}, arch)


def test_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(AbqError, match=r"cuda:1 has compute capability 7\.5; .* 8\.0"):
        jit.arch_of(torch.device("cuda", 1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_tensor_core_instructions_are_native(arch, monkeypatch, tmp_path):
    (tmp_path / "src" / "common.cuh").write_text((SOURCES / "common.cuh").read_text())
    (tmp_path / "src" / "products.cuh").write_text("""#include "common.cuh"
template <class C> __global__ void product(int* out, uint4 a, uint2 b) {
    int d[4] = {};
    if constexpr (C::binary) {
        mma_b1(d, a, b);
    } else {
        mma_u8(d, {a.x, a.y, a.z, a.w}, b);
    }
    out[threadIdx.x] = d[0] + d[1] + d[2] + d[3];
}
""")
    binary = sass(jit.compile_cubin("products", "product", {"binary": True}, arch)[0])
    assert "BMMA.168256.AND.POPC" in binary and "IMMA.16" not in binary
    bytes_ = sass(jit.compile_cubin("products", "product", {"binary": False}, arch)[0])
    assert "IMMA.16832.U8.U8" in bytes_ and "BMMA" not in bytes_


# --- loading ---


def test_load_once(fake, compilations, monkeypatch):
    device = torch.device("cuda", 0)
    loaded = jit.load("tiny", "tiny", {"amount": 3}, device)
    cubin, name = jit.compile_cubin("tiny", "tiny", {"amount": 3}, "sm_90a")
    assert fake.calls == [("load", cubin), ("get", 0x11B, name.encode())]
    assert (loaded.name, loaded.handle, loaded.programmatic) == ("tiny<amount=3>", 0xABCDEF0123456789, True)
    assert jit.load("tiny", "tiny", {"amount": 4}, device) is not loaded and len(compilations) == 2
    monkeypatch.delattr(jit, "compile_cubin")  # it reads and hashes files: too slow for every call of a layer
    assert jit.load("tiny", "tiny", {"amount": 3}, device) is loaded


def test_threads_load_once(fake):
    jit.compiler_version()
    device = torch.device("cuda", 0)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(jit.load("tiny", "tiny", {"amount": 3}, device))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(each) for each in found}) == 1
    assert [call[0] for call in fake.calls] == ["load", "get"]


def test_load_failure_names_the_driver(fake):
    fake.results = [200]
    with pytest.raises(AbqError, match=r"CUDA 12\.9, cannot load kernel tiny<amount=3> for sm_90a: CUDA_ERROR_200"):
        jit.load("tiny", "tiny", {"amount": 3}, torch.device("cuda", 0))


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    driver.libcuda.cache_clear()
    with pytest.raises(AbqError, match=r"no NVIDIA driver: libcuda\.so\.1"):
        driver.libcuda()
