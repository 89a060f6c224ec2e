// Per-token quantization for many tokens: one block of threads a tile of 8 tokens, each of them shared by C::parts warps.
//
// `quantize` in quantize.cuh keeps a token in registers and writes its codes as they come, 16 bytes a line. Here the codes of
// `at_once` k-blocks of all 8 tokens meet in shared memory and leave as whole lines of 128 bytes. A warp looks at its part of
// the token twice: with C::kept it is in shared memory the second time, else in a cache, if it is not too large for that.
//
//   C::blocks   k-blocks of a warp at a time
//   C::layout   1  bytes, or 2  plane bytes: see quantize.cuh. Both are lines [k-block][line][tiles][8 tokens][16 bytes].
#pragma once

#include "quantize.cuh"

template <class C> __global__ void __launch_bounds__(256 * C::parts) quantize_tiles(
    const typename C::T* x, const typename C::T* other, float epsilon, unsigned char* codes, float* scales, int* zeros,
    int* sums, int* group_sums, int tokens, int columns, int k_blocks, int tiles, int groups) {
    using T = typename C::T;
    constexpr int at_once = C::parts * C::blocks;
    constexpr int lines = C::layout == 1 ? 16 : 2 * C::bits;  // of a k-block
    __shared__ __align__(16) unsigned char buffer[2][at_once][lines][8][16];
    __shared__ float squares_of[8][C::parts], tops[8][C::parts], bottoms[8][C::parts];
    __shared__ int sum_of[8];
    extern __shared__ uint4 dynamic[];  // kept values [8 tokens][k-blocks][2][32 lanes], if any, then
    int* group_totals = reinterpret_cast<int*>(reinterpret_cast<Quad<T>*>(dynamic) + (C::kept ? 8 * 64 * k_blocks : 0));  // [8][groups]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % C::parts, tile = blockIdx.x;
    const int own = warp / C::parts, token = tile * 8 + own;                // this warp's: in the tile, of all
    const long long row = (long long)min(token, tokens - 1) * columns;  // tokens that are not there repeat the last one
    if (threadIdx.x < 8) sum_of[threadIdx.x] = 0;
    if constexpr (C::group_sums)
        for (int i = threadIdx.x; i < 8 * groups; i += 256 * C::parts) group_totals[i] = 0;
    grid_dependency_wait();
    grid_dependency_launch();

    auto source = [&](int kb, int h) {
        const int column = 256 * kb + (C::layout == 1 ? 8 * lane + 4 * h : fragment_column(lane, h));
        return quad_source<C::group_size, C::group_padded, C::whole>(column, columns);
    };
    float inverse_rms = 1;
    if constexpr (C::prologue == 1) {
        float squares = 0;
#pragma unroll 4
        for (int kb = part; kb < k_blocks; kb += C::parts)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const QuadSource from = source(kb, h);
                const Quad<T> quad = load_quad<T, C::aligned>(x + row, from);
#pragma unroll
                for (int i = 0; i < 4; i++)
                    if (i < from.count) squares += quad.value(i) * quad.value(i);
            }
#pragma unroll
        for (int other_lane = 16; other_lane > 0; other_lane /= 2) squares += __shfl_xor_sync(~0u, squares, other_lane);
        if (lane == 0) squares_of[own][part] = squares;
        __syncthreads();
        squares = 0;
#pragma unroll
        for (int p = 0; p < C::parts; p++) squares += squares_of[own][p];
        inverse_rms = rsqrtf(squares / columns + epsilon);
    }
    auto values = [&](QuadSource from) {
        const Quad<T> quad = load_quad<T, C::aligned>(x + row, from);
        if constexpr (C::prologue == 0) return quad;
        const Quad<T> second = load_quad<T, C::aligned>(C::prologue == 1 ? other : other + row, from);
        return after_prologue<T, C::prologue>(quad, second, inverse_rms);
    };

    // Loads of the next k-blocks are under way meanwhile; those past the end repeat the last one
    Quad<T> quad[C::blocks][2], next[C::blocks][2];
    auto load = [&](int first) {
#pragma unroll
        for (int b = 0; b < C::blocks; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) next[b][h] = values(source(min(first + b, k_blocks - 1), h));
    };
    auto take_and_load = [&](int first) {
#pragma unroll
        for (int b = 0; b < C::blocks; b++) quad[b][0] = next[b][0], quad[b][1] = next[b][1];
        load(first);
    };
    Quad<T>* kept = reinterpret_cast<Quad<T>*>(dynamic) + own * 64 * k_blocks + lane;
    const int begin = part * C::blocks;
    Range<T> range;
    load(begin);
    for (int first = begin; first < k_blocks; first += at_once) {
        take_and_load(first + at_once);
#pragma unroll
        for (int b = 0; b < C::blocks; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                range.add(quad[b][h]);
                if (C::kept && first + b < k_blocks) kept[(2 * (first + b) + h) * 32] = quad[b][h];
            }
    }
    const float part_top = warp_max(range.hi()), part_bottom = warp_max(range.lo());
    if (lane == 0) tops[own][part] = part_top, bottoms[own][part] = part_bottom;
    __syncthreads();
    float top = tops[own][0], bottom = bottoms[own][0];
#pragma unroll
    for (int p = 1; p < C::parts; p++) top = fmaxf(top, tops[own][p]), bottom = fmaxf(bottom, bottoms[own][p]);
    const Grid grid = choose_grid<C::bits, C::symmetric>(-bottom, top);

    int sum = 0, parity = 0;
    if constexpr (!C::kept) load(begin);
    for (int together = 0; together < k_blocks; together += at_once, parity ^= 1) {
        const int first = together + begin;
        if constexpr (!C::kept) take_and_load(first + at_once);
#pragma unroll
        for (int b = 0; b < C::blocks; b++) {
            const int kb = first + b;
            if (kb >= k_blocks) break;
            if constexpr (C::kept) quad[b][0] = kept[2 * kb * 32], quad[b][1] = kept[(2 * kb + 1) * 32];
            unsigned word[2];
#pragma unroll
            for (int h = 0; h < 2; h++) word[h] = codes_of<C::bits>(quad[b][h], source(kb, h), grid);
            const int block_sum = sum_of_bytes(word[0], sum_of_bytes(word[1], 0));
            sum += block_sum;
            if constexpr (C::group_sums) {
                const int group = (256 * kb + 8 * lane) / C::group_padded;
                if (group < groups) atomicAdd(&group_totals[own * groups + group], block_sum);
            }
            auto& codes_of_block = buffer[parity][begin + b];
            if constexpr (C::layout == 1) {
                *reinterpret_cast<uint2*>(&codes_of_block[lane / 2][own][lane % 2 * 8]) = make_uint2(word[0], word[1]);
            } else {
                const uint2 words = plane_fragment(word[0], word[1], lane);
                const int plane = lane / 4, t = lane % 4;
                if (plane < C::bits) {
                    *reinterpret_cast<unsigned*>(&codes_of_block[2 * plane][own][t * 4]) = words.x;
                    *reinterpret_cast<unsigned*>(&codes_of_block[2 * plane + 1][own][t * 4]) = words.y;
                }
            }
        }
        __syncthreads();
        for (int piece = threadIdx.x; piece < at_once * lines * 8; piece += 256 * C::parts) {
            const int line = together * lines + piece / 8;
            if (line >= k_blocks * lines) break;
            uint4* to = reinterpret_cast<uint4*>(codes) + ((long long)line * tiles + tile) * 8 + piece % 8;
            *to = reinterpret_cast<const uint4*>(buffer[parity])[piece];
        }
    }
    sum = __reduce_add_sync(~0u, sum);
    if (lane == 0) atomicAdd(&sum_of[own], sum);
    __syncthreads();
    if (lane == 0 && part == 0 && token < tokens) {
        scales[token] = grid.scale;
        zeros[token] = grid.zero;
        sums[token] = sum_of[own];
    }
    if constexpr (C::group_sums)
        for (int at = threadIdx.x; at < 8 * groups; at += 256 * C::parts)
            group_sums[(long long)(at / 8) * tiles * 8 + tile * 8 + at % 8] = group_totals[at % 8 * groups + at / 8];
}
