import pytest
import torch

from abq_llm.kernels.cuda import driver, launch
from tests.kernels.cuda.fake_driver import FakeDriver


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

    monkeypatch.setattr(driver, "libcuda", lambda: fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(launch, "_current_stream", lambda index: 0x5000000000 + index if index == current[-1] else -1)
    return fake
