"""The build: for another architecture, without a compiler, and without code that a CPU might not have."""

import os
import shutil
import subprocess

import pytest

from tests import native

LEVEL_OBJECTS = ("amx.cpp.o", "avx512.cpp.o", "avx2.cpp.o", "neon.cpp.o")


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs the Debian packages g++-aarch64-linux-gnu and qemu-user",
)
def test_neon_under_an_emulator_agrees_with_scalar():
    build = native.BUILD.parent / "aarch64"
    native.cmake(
        build,
        "-DABQ_MODULE=OFF",
        "-DABQ_CHECK=ON",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    done = subprocess.run(["qemu-aarch64", build / "levels_check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "neon: 500 of 500 cases as scalar"), done.stdout


def test_no_compiler_is_one_clear_line(tmp_path):
    cmake = native.tool("cmake")
    environment = {**os.environ, "CXX": "/nowhere/c++"}
    done = subprocess.run([cmake, "-S", native.ROOT, "-B", tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode != 0
    assert "abq-llm needs a C++17 compiler for its CPU kernels" in " ".join(done.stderr.split())


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_no_function_compiled_for_a_newer_cpu_can_replace_a_common_one():
    """The linker keeps one of several weak copies of an inline function, and it might be the one with AVX-512."""
    objects = [path for name in LEVEL_OBJECTS for path in native.BUILD.rglob(name)]
    assert objects
    for path in objects:
        symbols = subprocess.run(["nm", "-C", path], capture_output=True, text=True, check=True).stdout
        assert [line for line in symbols.splitlines() if line[17:18] in ("W", "V", "u")] == [], path
