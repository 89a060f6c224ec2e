#!/bin/sh
# Builds libabq_cutlass.so beside this file: CUTLASS's integer products for `abq bench kernels --cutlass`.
# sh build.sh [CUTLASS] [ARCH]
# CUTLASS: a checkout, or where `pip download --no-deps nvidia-cutlass` was unpacked to: cutlass_library/source.
# ARCH: 90a (the default, with wgmma), or another from 80 on, as nvcc names it.
# Needs nvcc and some minutes.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cutlass=${1:-cutlass}
arch=${2:-90a}
hopper=
[ "$arch" != 90a ] || hopper=-DHOPPER
exec nvcc -std=c++17 -O3 -DNDEBUG $hopper -gencode "arch=compute_$arch,code=sm_$arch" --expt-relaxed-constexpr \
    -I "$cutlass/include" -I "$cutlass/tools/util/include" -cudart static -shared -Xcompiler -fPIC,-fvisibility=default \
    "$here/gemm.cu" -o "$here/libabq_cutlass.so"
