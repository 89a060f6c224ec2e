// x of 16 bits, row-major [M, K] -> [K / 8 chunks][MT][8 tokens][8 columns], as `gemm_wgmma_f16` reads it: of every 16 columns
// the pairs 0, 2, 4, 6 make the first chunk and 1, 3, 5, 7 the second. Groups are padded with zeros to multiples of 32 columns.
#pragma once
#include "codes.cuh"

// Thread t of a block: token t % 8 of tile blockIdx.y, and 16 columns. C::aligned: four columns are read as one.
template <class C> __global__ void __launch_bounds__(256) x_tiles(
    const typename C::T* x, uint4* out, int M, int K, int k_blocks, int MT) {
    grid_dependency_launch();
    grid_dependency_wait();
    const int token = blockIdx.y * 8 + threadIdx.x % 8, part = blockIdx.x * 32 + threadIdx.x / 8;
    if (token >= M || part >= k_blocks * 16) return;
    uint2 quads[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const QuadSource from = quad_source<C::group_size, C::group_padded, false>(part * 16 + 4 * i, K);
        quads[i] = make_uint2(0, 0);
        if (from.count) quads[i] = load_quad<typename C::T, C::aligned>(x + (long long)token * K, from).words;
    }
    uint4* to = out + ((long long)2 * part * MT + blockIdx.y) * 8 + threadIdx.x % 8;
    to[0] = make_uint4(quads[0].x, quads[1].x, quads[2].x, quads[3].x);
    to[(long long)MT * 8] = make_uint4(quads[0].y, quads[1].y, quads[2].y, quads[3].y);
}
