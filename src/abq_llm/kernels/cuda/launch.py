"""A launch in a few microseconds of host time (`cuda.core.launch` takes 12 to 14), on torch's current stream.

A model launches hundreds of kernels a token: outside of a CUDA graph their host time is the token's. So the buffer that
holds the arguments is made once per thread and list of types, and the driver is called directly.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from ctypes import addressof, byref, c_void_p

import torch
from torch import Tensor

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import driver
from abq_llm.kernels.cuda.jit import Kernel

Dim3 = tuple[int, int, int]
Argument = Tensor | int | float | None

_PROGRAMMATIC = driver.LaunchAttribute(id=driver.PROGRAMMATIC_STREAM_SERIALIZATION, value=1)


class Arguments:
    """The memory from which the driver copies the arguments of a launch. Codes are those of `struct`: P, i, f."""

    def __init__(self, codes: str) -> None:
        self.struct = struct.Struct(codes)  # native alignment, though each argument is found by its own pointer
        self.buffer = ctypes.create_string_buffer(max(1, self.struct.size))
        ends = [struct.calcsize(codes[: i + 1]) for i in range(len(codes))]
        starts = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]
        self.pointers = (c_void_p * len(codes))(*(addressof(self.buffer) + start for start in starts))


class _Cache(threading.local):
    """Per thread, because a thread may launch while another one is inside the driver."""

    def __init__(self) -> None:
        self.arguments: dict[str, Arguments] = {}


_cache = _Cache()


def launch(
    kernel: Kernel,
    grid: Dim3,
    block: Dim3,
    args: Sequence[Argument],
    shared_bytes: int = 0,
    programmatic: bool = False,
) -> None:
    """Enqueue `kernel` on torch's current stream of the tensors' device. It can be captured by a CUDA graph.

    args: a tensor is passed as its pointer, None as a null pointer, an int as a 32-bit int, a float as fp32.
    shared_bytes: dynamic shared memory per block.
    programmatic: the kernel may start while its predecessor drains (see `grid_dependency_wait`); a no-op below sm_90.
    """
    index = next((arg.get_device() for arg in args if isinstance(arg, Tensor)), -1)
    if index < 0:
        raise AbqError(f"kernel {kernel.name} is given no tensor on a GPU")
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, block, args, shared_bytes, programmatic)
        return
    arguments = pack(kernel, args, index)
    kernel.allow_shared(shared_bytes, index)
    use_attribute = programmatic and kernel.programmatic
    config = driver.LaunchConfig(
        *grid,
        *block,
        shared_bytes,
        _current_stream(index),
        addressof(_PROGRAMMATIC) if use_attribute else None,
        use_attribute,
    )
    enqueue = driver.libcuda().cuLaunchKernelEx
    result = enqueue(byref(config), kernel.handle, arguments.pointers, None)
    if result == driver.INVALID_CONTEXT:  # the first use of CUDA in this thread: torch binds its context lazily
        driver.bind_primary_context(index)
        result = enqueue(byref(config), kernel.handle, arguments.pointers, None)
    if result:
        shape = f"grid {grid}, block {block}, {shared_bytes} bytes of shared memory"
        raise AbqError(f"kernel {kernel.name} with {shape}: {driver.error_name(result)}")


def pack(kernel: Kernel, args: Sequence[Argument], index: int) -> Arguments:
    """Write `args` to this thread's memory for arguments of their types."""
    codes = ""
    values: list[int | float] = []
    for arg in args:
        if isinstance(arg, Tensor):
            if arg.get_device() != index:
                raise AbqError(f"kernel {kernel.name} runs on cuda:{index} and is given a tensor on {arg.device}")
            codes += "P"
            values.append(arg.data_ptr())
        elif arg is None:
            codes += "P"
            values.append(0)
        elif isinstance(arg, float):
            codes += "f"
            values.append(arg)
        elif isinstance(arg, int) and not isinstance(arg, bool):
            codes += "i"
            values.append(arg)
        else:
            raise TypeError(f"kernel {kernel.name} is given {arg!r}, which is no tensor, int, float or None")
    arguments = _cache.arguments.get(codes)
    if arguments is None:
        arguments = _cache.arguments[codes] = Arguments(codes)
    try:
        arguments.struct.pack_into(arguments.buffer, 0, *values)
    except struct.error as error:
        raise AbqError(f"kernel {kernel.name} is given an int that 32 bits do not hold: {error}") from error
    return arguments


def _current_stream(index: int) -> int:
    return torch._C._cuda_getCurrentRawStream(index)  # a tenth of the cost of torch.cuda.current_stream
