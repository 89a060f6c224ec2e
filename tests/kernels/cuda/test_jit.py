"""Compiling, the cache of cubins and the launcher's host side. None of it needs a GPU; the driver is a fake."""

import ctypes
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import driver, jit, launch
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
    jit.compiler_version()  # it compiles an empty file, once per process
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


def test_compiler_version_has_the_patch_level():
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    assert f", NVRTC V{major}.{minor}." in jit.compiler_version()


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


# --- driver and launch ---


class FakeDriver:
    """Notes what it is asked for. `results` are the CUresults of the next launches, 0 when they run out."""

    def __init__(self):
        self.calls = []
        self.results = []

    def cuLaunchKernelEx(self, config, handle, pointers, extra):
        config = config._obj
        attributes = ctypes.cast(config.attributes, ctypes.POINTER(driver.LaunchAttribute))
        self.calls.append(
            SimpleNamespace(
                handle=handle,
                grid=(config.grid_x, config.grid_y, config.grid_z),
                block=(config.block_x, config.block_y, config.block_z),
                shared_bytes=config.shared_bytes,
                stream=config.stream,
                attributes=[(attributes[i].id, attributes[i].value) for i in range(config.attribute_count)],
                # what the driver would copy, wherever it may point: 4 bytes are readable at every argument
                words=[ctypes.c_uint32.from_address(pointer).value for pointer in pointers],
                pointers=list(pointers),
            )
        )
        return self.results.pop(0) if self.results else 0

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.calls.append(("limit", attribute, value, kernel, device))
        return 1 if value > 227 * 1024 else 0

    def cuDeviceGet(self, out, index):
        out._obj.value = index + 100
        return 0

    def cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = 0xC0
        return 0

    def cuCtxSetCurrent(self, context):
        self.calls.append(("context", context.value))
        return 0

    def cuDriverGetVersion(self, out):
        out._obj.value = 12090
        return 0

    def cuGetErrorName(self, result, out):
        out._obj.value = f"CUDA_ERROR_{result}".encode()
        return 0

    def cuLibraryLoadData(self, out, code, *options):
        self.calls.append(("load", code))
        out._obj.value = 0x11B
        return self.results.pop(0) if self.results else 0

    def cuLibraryGetKernel(self, out, library, name):
        self.calls.append(("get", library.value, name))
        out._obj.value = 0xABCDEF0123456789
        return 0


class OnGpu(torch.Tensor):
    index = 0

    def get_device(self):
        return self.index


def on_gpu(index: int = 0) -> torch.Tensor:
    tensor = torch.zeros(4).as_subclass(OnGpu)
    tensor.index = index
    return tensor


@pytest.fixture
def fake(monkeypatch):
    fake = FakeDriver()
    current = [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_current_stream", lambda index: 0x5000000000 + index if index == current[-1] else -1)
    return fake


def kernel(programmatic: bool = True) -> jit.Kernel:
    return jit.Kernel("tiny<amount=3>", 0xABCDEF0123456789, programmatic)


def test_structs_are_those_of_cuda_h():
    """Offsets printed by a C program that includes cuda.h of CUDA 13.0, on 64-bit Linux."""
    config, attribute = driver.LaunchConfig, driver.LaunchAttribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    offsets = [getattr(config, name).offset for name, _ in config._fields_]
    assert offsets == [0, 4, 8, 12, 16, 20, 24, 32, 40, 48]
    assert (attribute.id.offset, attribute.value.offset) == (0, 8)


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
    driver.library.cache_clear()
    with pytest.raises(AbqError, match=r"no NVIDIA driver: libcuda\.so\.1"):
        driver.library()


def test_launch_passes_everything(fake):
    x = on_gpu()
    launch.launch(kernel(), (70000, 2, 3), (128, 4, 5), [x, 7, None, -1, 0.5, x], programmatic=True)
    (call,) = fake.calls
    assert (call.handle, call.stream) == (0xABCDEF0123456789, 0x5000000000)
    assert (call.grid, call.block, call.shared_bytes) == ((70000, 2, 3), (128, 4, 5), 0)
    assert call.attributes == [(6, 1)]
    assert call.words[1:5] == [7, 0, 2**32 - 1, 0x3F000000]
    for i in (0, 5):
        assert ctypes.c_uint64.from_address(call.pointers[i]).value == x.data_ptr()
    assert ctypes.c_uint64.from_address(call.pointers[2]).value == 0
    assert all(pointer % 8 == 0 for pointer in (call.pointers[i] for i in (0, 2, 5)))


def test_programmatic_needs_the_hardware(fake):
    launch.launch(kernel(programmatic=False), (1, 1, 1), (32, 1, 1), [on_gpu()], programmatic=True)
    launch.launch(kernel(), (1, 1, 1), (32, 1, 1), [on_gpu()])
    assert [call.attributes for call in fake.calls] == [[], []]


def test_shared_memory_limit_is_raised_once_per_device(fake):
    tiny = kernel()
    for index, shared_bytes in [(0, 0), (0, 4096), (0, 4096), (0, 100_000), (0, 4096), (1, 100_000), (1, 100_000)]:
        launch.launch(tiny, (1, 1, 1), (32, 1, 1), [on_gpu(index)], shared_bytes=shared_bytes)
    limits = [call[1:] for call in fake.calls if isinstance(call, tuple)]
    handle = 0xABCDEF0123456789
    assert limits == [(8, 4096, handle, 100), (8, 100_000, handle, 100), (8, 100_000, handle, 101)]
    assert sum(isinstance(call, SimpleNamespace) for call in fake.calls) == 7
    with pytest.raises(
        AbqError, match="tiny<amount=3> cannot have 300000 bytes of shared memory on cuda:1: CUDA_ERROR_1"
    ):
        launch.launch(tiny, (1, 1, 1), (32, 1, 1), [on_gpu(1)], shared_bytes=300_000)


def test_launch_on_the_tensors_device(fake):
    launch.launch(kernel(), (1, 1, 1), (32, 1, 1), [None, on_gpu(1), 3])
    assert fake.calls[0].stream == 0x5000000001  # made current for the launch
    assert torch.cuda.current_device() == 0


def test_thread_without_context_gets_torchs(fake):
    fake.results = [driver.INVALID_CONTEXT]
    launch.launch(kernel(), (1, 1, 1), (32, 1, 1), [on_gpu()])
    first, bound, second = fake.calls
    assert bound == ("context", 0xC0) and first == second


def test_launch_failure_names_the_shape(fake):
    fake.results = [1]
    with pytest.raises(
        AbqError, match=r"tiny<amount=3> with grid \(0, 1, 1\), block \(2048, 1, 1\), 16 bytes .*: CUDA_ERROR_1$"
    ):
        launch.launch(kernel(), (0, 1, 1), (2048, 1, 1), [on_gpu()], shared_bytes=16)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([3, None], "no tensor on a GPU"),
        ([torch.zeros(1)], "no tensor on a GPU"),
        ([on_gpu(), torch.zeros(1)], "runs on cuda:0 and is given a tensor on cpu"),
        ([on_gpu(), 2**31], "32 bits"),
        ([on_gpu(), -(2**31) - 1], "32 bits"),
    ],
)
def test_bad_arguments_are_refused(args, message, fake):
    with pytest.raises(AbqError, match=message):
        launch.launch(kernel(), (1, 1, 1), (32, 1, 1), args)
    assert not fake.calls


@pytest.mark.parametrize("arg", [True, "3", torch.float16])
def test_arguments_of_other_types_are_refused(arg, fake):
    with pytest.raises(TypeError, match="tiny<amount=3>"):
        launch.launch(kernel(), (1, 1, 1), (32, 1, 1), [on_gpu(), arg])


def test_each_thread_has_arguments_of_its_own(fake):
    """A thread inside the driver must find its arguments unchanged: ctypes releases the GIL there."""
    barrier = threading.Barrier(2)
    plain = fake.cuLaunchKernelEx

    def slow(config, handle, pointers, extra):
        barrier.wait(timeout=5)  # both threads have packed their arguments
        return plain(config, handle, pointers, extra)

    fake.cuLaunchKernelEx = slow
    threads = [
        threading.Thread(target=launch.launch, args=(kernel(), (1, 1, 1), (32, 1, 1), [on_gpu(), number]))
        for number in (11, 22)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(call.words[1] for call in fake.calls) == [11, 22]
