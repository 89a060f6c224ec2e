"""Names of devices."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from abq_llm.errors import AbqError


def pick_device(name: str | torch.device) -> torch.device:
    """The device of that name; "auto" is the first GPU, or else the CPU.

    Raises:
        AbqError: no such device, or no GPU that torch can use.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise AbqError(f"device {str(name)!r} is no device: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise AbqError(f"device {str(name)!r}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs")
    return device


def pick_devices(names: str) -> list[torch.device]:
    """The devices of names with commas between them, all of one type; "auto" is every GPU, or else the CPU.

    Raises:
        AbqError: see `pick_device`, or devices of two types.
    """
    if names == "auto" and torch.cuda.is_available():
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise AbqError(f"devices {names!r}: are of two types, whose figures differ")
    return list(dict.fromkeys(devices))


def device_name(device: torch.device) -> str:
    """What to call `device` in a record: the GPU's name, or the processor's and how many threads torch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
