"""A driver that notes its calls, and tensors that say they are on a GPU."""

import ctypes
from types import SimpleNamespace

import torch

from abq_llm.kernels.cuda import driver


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
