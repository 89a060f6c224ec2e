"""What the hardware will run: the disassembly of a cubin."""

import importlib.metadata
import re
import subprocess
import tempfile
from pathlib import Path


def sass(cubin: bytes) -> str:
    """The output of nvdisasm, of the wheel `nvidia-cuda-nvdisasm`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm: {done.stderr.strip()}")
    return done.stdout


def nvdisasm() -> Path:
    try:
        files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError("this test needs a disassembler: pip install nvidia-cuda-nvdisasm") from error
    found = [Path(file.locate()) for file in files if file.name == "nvdisasm"]
    if not found or not found[0].exists():
        raise RuntimeError("the installed nvidia-cuda-nvdisasm holds no nvdisasm: install it again")
    return found[0]


def overwritten_in_flight(text: str) -> list[str]:
    """Instructions that write registers of a warpgroup product still under way, in the order of the text.

    A product reads its operand and writes its sums until WARPGROUP.DEPBAR has waited for its group, which gsb0 ends.
    """
    found = []
    groups: list[set[int]] = []  # registers of each group under way
    group: set[int] = set()
    for line in re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE):
        if product := re.search(r"GMMA\.64x(\d+)x\S* R(\d+), (?:R(\d+), )?gdesc", line):
            n, sums, operand = product.groups()
            group = group | set(range(int(sums), int(sums) + int(n) // 2))
            group |= set(range(int(operand), int(operand) + 4)) if operand else set()
            if "gsb0" in line:
                groups, group = [*groups, group], set()
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d+)", line):
            groups = groups[len(groups) - int(wait[1]) :] if int(wait[1]) else []
        elif target := re.match(r"(?:@!?U?P\w+ )?(?!ST|RED)([A-Z][\w.]*) R(\d+)\b", line):
            words = 4 if ".128" in target[1] else 2 if re.search(r"\.64|WIDE|^CS2R$", target[1]) else 1
            written = set(range(int(target[2]), int(target[2]) + words))
            found += [line] if any(written & each for each in (*groups, group)) else []
    return found
