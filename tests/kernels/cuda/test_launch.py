"""The launcher's host side. None of it needs a GPU; the driver is a fake."""

import ctypes
import threading
from types import SimpleNamespace

import pytest
import torch

from abq_llm.errors import AbqError
from abq_llm.kernels.cuda import driver, jit, launch
from tests.kernels.cuda.fake_driver import on_gpu


def kernel(programmatic: bool = True) -> jit.Kernel:
    return jit.Kernel("tiny<amount=3>", 0xABCDEF0123456789, programmatic)


def test_structs_are_those_of_cuda_h():
    """Offsets printed by a C program that includes cuda.h of CUDA 13.0, on 64-bit Linux."""
    config, attribute = driver.LaunchConfig, driver.LaunchAttribute
    assert (ctypes.sizeof(config), ctypes.sizeof(attribute)) == (56, 72)
    offsets = [getattr(config, name).offset for name, _ in config._fields_]
    assert offsets == [0, 4, 8, 12, 16, 20, 24, 32, 40, 48]
    assert (attribute.id.offset, attribute.value.offset) == (0, 8)


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
