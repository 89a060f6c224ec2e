"""What the hardware will run: the disassembly of a cubin."""

import importlib.metadata
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
