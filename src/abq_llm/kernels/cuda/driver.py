"""The few functions of the CUDA driver that torch does not offer, through ctypes: no dependency but the driver itself.

Kernels are loaded as libraries (CUDA 12), which belong to no context: one handle serves every GPU of the process.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, byref, c_char_p, c_int, c_uint, c_void_p

from abq_llm.errors import AbqError

INVALID_CONTEXT = 201
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID


class LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute: the value is a union of 64 bytes, of which we only ever write an int."""

    _fields_ = (("id", c_int), ("_", c_int), ("value", c_int), ("_rest", c_int * 15))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((f"{size}_{axis}", c_uint) for size in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", c_void_p),
        ("attribute_count", c_uint),
    )


# Without its types, ctypes would pass a handle that is a Python int as 32 bits.
SIGNATURES = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    # library, code, JIT options (keys, values, count), library options (keys, values, count)
    "cuLibraryLoadData": (POINTER(c_void_p), c_char_p, *(c_void_p, c_void_p, c_uint) * 2),
    "cuLibraryGetKernel": (POINTER(c_void_p), c_void_p, c_char_p),
    "cuKernelSetAttribute": (c_int, c_int, c_void_p, c_int),
    "cuLaunchKernelEx": (POINTER(LaunchConfig), c_void_p, c_void_p, c_void_p),
}


@functools.cache
def libcuda() -> ctypes.CDLL:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        for name, types in SIGNATURES.items():
            getattr(cuda, name).argtypes = types
    except OSError as error:
        raise AbqError(f"no NVIDIA driver: {error}") from error
    except AttributeError as error:
        raise AbqError(f"the NVIDIA driver is older than CUDA 12: {error}") from error
    if result := cuda.cuInit(0):
        raise AbqError(f"the NVIDIA driver does not start: error {result}")
    return cuda


def error_name(result: int) -> str:
    """ "CUDA_ERROR_INVALID_VALUE" of a CUresult."""
    name = c_char_p()
    libcuda().cuGetErrorName(result, byref(name))
    return name.value.decode() if name.value else f"CUDA error {result}"


def check(result: int, what: str) -> None:
    if result:
        raise AbqError(f"{what}: {error_name(result)}")


def load_kernel(cubin: bytes, mangled_name: str, name: str) -> int:
    """The CUkernel of a cubin. It is never unloaded; `name` is for messages."""
    loaded, kernel, version = c_void_p(), c_void_p(), c_int()
    cuda = libcuda()
    if result := cuda.cuLibraryLoadData(byref(loaded), cubin, None, None, 0, None, None, 0):
        cuda.cuDriverGetVersion(byref(version))
        driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
        raise AbqError(f"the driver, for CUDA {driver}, cannot load kernel {name}: {error_name(result)}")
    check(cuda.cuLibraryGetKernel(byref(kernel), loaded, mangled_name.encode()), f"kernel {name}")
    assert kernel.value is not None
    return kernel.value


def device_handle(index: int) -> int:
    device = c_int()
    check(libcuda().cuDeviceGet(byref(device), index), f"device cuda:{index}")
    return device.value


def set_shared_limit(kernel: int, index: int, shared_bytes: int, name: str) -> None:
    """Allow `kernel` that much dynamic shared memory per block on device `index`; it starts with 48 KiB."""
    result = libcuda().cuKernelSetAttribute(MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes, kernel, device_handle(index))
    check(result, f"kernel {name} cannot have {shared_bytes} bytes of shared memory on cuda:{index}")


def bind_primary_context(index: int) -> None:
    """Make torch's context of device `index` the current one of this thread."""
    context = c_void_p()
    cuda = libcuda()
    check(cuda.cuDevicePrimaryCtxRetain(byref(context), device_handle(index)), f"context of cuda:{index}")
    check(cuda.cuCtxSetCurrent(context), f"context of cuda:{index}")
