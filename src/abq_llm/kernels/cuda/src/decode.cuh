// y[M, N] = x W^T for few tokens, by binary tensor cores:
//
//     sum_k q_w q_x = sum_p sum_j 2^(p + j) popcount(plane p of W & plane j of x)
//
// The bit-planes of the tokens are the columns of the product: with 8 bits, one token fills the 8 columns of `mma_b1`, so
// the planes of W come from memory and are multiplied as they are: no expansion, no shared memory.
//
//              k-blocks of 256 columns:  0    1    2   ...        Each warp keeps its k-blocks of x in registers, and
//     tile 0   16 rows                  w0   w1   w2   w3  w0     goes from tile to tile of the rows of W; a register
//     tile 1   16 rows                  w0   w1   w2   w3  w0     that has been multiplied is at once refilled with what
//     ...                                                         comes `C::depth` k-blocks later. Sums of the warps are
//                                                                 added through shared memory.
//
//   C::columns    of a token in the product: its bits, rounded up to 2, 4, 8 or 16
//   C::tiles      of 8 columns; a block does tiles * 8 / columns tokens
//   C::x_blocks   k-blocks of a warp, a multiple of C::depth
//   C::fused      x is quantized here, by every block anew (one token): no kernel before this one to wait for
//   C::in_floats  groups, or 16-bit x with a scale for every k-block: sums are scaled and added in fp32 part by part
#pragma once

#include "codes.cuh"
#include "epilogue.cuh"

struct Factor {  // of a row in a group
    float scale;
    int zero;
};

// Groups of `words` x 32 columns that meet a k-block of 8 words, at most
__device__ constexpr int groups_in_block(int words) {
    int most = 1;
    for (int kb = 0; kb < words && kb < 64; kb++) {
        int met = (8 * kb + 7) / words - 8 * kb / words + 1;
        most = met > most ? met : most;
    }
    return most;
}

// The largest of a warp's values, none of them negative: their bits order as integers do
__device__ inline float warp_max(float value) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fabsf(value))));
}

template <class C> __global__ void __launch_bounds__(32 * C::warps) decode(
    const uint4* weight, const void* x, const float* w_scale, const void* w_zero, const void* w_sum, const float* x_scale,
    const int* x_zero, const int* x_sum, const float* bias, typename C::T* y, int M, int N, int K, int k_blocks, int x_tiles,
    int row_tiles, int groups) {
    using T = typename C::T;
    using Sum = typename C::Sum;
    constexpr int tokens = C::tiles * 8 / C::columns, groups_met = C::in_floats ? groups_in_block(C::group_words) : 1;
    constexpr bool by_plane = !C::in_floats && C::tiles * C::planes <= 16;  // a sum for each plane fits in registers
    static_assert(C::x_blocks % C::depth == 0);
    __shared__ Sum partial[2][C::warps][tokens][16];
    __shared__ float tops[C::warps], bottoms[C::warps];
    __shared__ int fused_sum;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_tile = blockIdx.y * C::tiles, first_token = first_tile * 8 / C::columns;
    const int padded_rows = row_tiles * 16;

    uint4 planes[C::depth][C::planes];
    Factor factors[C::depth][groups_met][2];  // of rows g and g + 8
    auto load = [&](int slot, int row_tile, int block) {
        const int kb = block * C::warps + warp;
        const bool inside = row_tile < row_tiles && kb < k_blocks;
        const uint4* from = weight + ((long long)row_tile * k_blocks + kb) * C::planes * 32 + lane;
#pragma unroll
        for (int p = 0; p < C::planes; p++) planes[slot][p] = inside ? load_streaming(from + p * 32) : make_uint4(0, 0, 0, 0);
        if constexpr (C::in_floats) {
#pragma unroll
            for (int i = 0; i < groups_met; i++) {
                const int group = min(8 * kb / C::group_words + i, groups - 1);
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int row = row_tile * 16 + g + 8 * half;
                    if constexpr (C::grouped) {
                        const long long at = (long long)group * padded_rows + row;
                        factors[slot][i][half].scale = inside ? w_scale[at] : 0;
                        factors[slot][i][half].zero = inside ? static_cast<const unsigned char*>(w_zero)[at] : 0;
                    } else {
                        factors[slot][i][half].scale = 1;
                        factors[slot][i][half].zero = inside ? static_cast<const int*>(w_zero)[row] : 0;
                    }
                }
            }
        }
    };
    // What the epilogue needs of the row whose outputs this thread will write; also loaded a tile ahead
    float scale_next = 1, offset_next = 0;
    int zero_next = 0, sum_next = 0;
    auto load_row = [&](int row_tile) {
        const int row = min(row_tile, row_tiles - 1) * 16 + threadIdx.x % 16;
        if constexpr (!C::grouped) scale_next = w_scale[row];
        if constexpr (!C::in_floats) {
            zero_next = static_cast<const int*>(w_zero)[row];
            sum_next = static_cast<const int*>(w_sum)[row];
        } else if constexpr (C::grouped && C::bits < 16) {
            offset_next = static_cast<const float*>(w_sum)[row];
        }
    };
#pragma unroll
    for (int d = 0; d < C::depth; d++) load(d, blockIdx.x, d);
    load_row(blockIdx.x);
    if (C::programmatic) grid_dependency_launch();
    if (C::programmatic) grid_dependency_wait();

    // This warp's k-blocks of x, as fragments of bit-planes
    uint2 fragment[C::x_blocks][C::tiles];
    Grid grid{};
    if constexpr (C::fused) {
        const T* raw = static_cast<const T*>(x);
        if (threadIdx.x == 0) fused_sum = 0;
        auto column_of = [&](int b, int i) {
            const int kb = b * C::warps + warp;
            return source_column<C::group_size, C::group_padded>(256 * kb + 32 * i + first_column(lane), K);
        };
        T bits[C::x_blocks][8];  // all loads before the first use, none of them conditional: one latency, not several
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) bits[b][i] = raw[max(column_of(b, i), 0)];
        float value[C::x_blocks][8], top = 0, bottom = 0;
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                value[b][i] = column_of(b, i) >= 0 ? to_float(bits[b][i]) : 0;
                top = fmaxf(top, value[b][i]);
                bottom = fmaxf(bottom, -value[b][i]);
            }
        top = warp_max(top);
        bottom = warp_max(bottom);
        if (lane == 0) {
            tops[warp] = top;
            bottoms[warp] = bottom;
        }
        __syncthreads();
        top = warp_max(lane < C::warps ? tops[lane] : 0);
        bottom = warp_max(lane < C::warps ? bottoms[lane] : 0);
        grid = choose_grid<C::bits, C::symmetric>(-bottom, top);
        int sum = 0;
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++) {
            unsigned low = 0, high = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const unsigned code = column_of(b, i) >= 0 ? code_of<C::bits>(value[b][i], grid) : 0;
                sum += code;
                (i < 4 ? low : high) |= code << (8 * (i % 4));
            }
            fragment[b][0] = plane_fragment(low, high, lane);
        }
        sum = __reduce_add_sync(~0u, sum);
        if (lane == 0) atomicAdd(&fused_sum, sum);
    } else {
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                const int kb = b * C::warps + warp;
                const uint2* from = static_cast<const uint2*>(x) + ((long long)kb * x_tiles + first_tile + n) * 32 + lane;
                fragment[b][n] = kb < k_blocks ? *from : make_uint2(0, 0);
            }
    }

    int parity = 0;
    for (int row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x, parity ^= 1) {
        const int n_out = row_tile * 16 + threadIdx.x % 16;
        const float scale_out = scale_next, offset_out = offset_next;
        const int zero_out = zero_next, sum_out = sum_next;
        load_row(row_tile + gridDim.x);

        int plane_sums[by_plane ? C::tiles : 1][by_plane ? C::planes : 1][4] = {};
        Sum sums[C::tiles][2] = {};  // columns 2t + 2 * column 2t + 1; rows g and g + 8
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++) {
            const int slot = b % C::depth, kb = b * C::warps + warp;
            if constexpr (by_plane) {
#pragma unroll
                for (int p = 0; p < C::planes; p++)
#pragma unroll
                    for (int n = 0; n < C::tiles; n++) mma_b1(plane_sums[n][p], planes[slot][p], fragment[b][n]);
            } else if constexpr (!C::in_floats) {
#pragma unroll
                for (int n = 0; n < C::tiles; n++)
#pragma unroll
                    for (int p = 0; p < C::planes; p++) {
                        int product[4] = {};
                        mma_b1(product, planes[slot][p], fragment[b][n]);
#pragma unroll
                        for (int half = 0; half < 2; half++)
                            sums[n][half] += (product[2 * half] + 2 * product[2 * half + 1]) << p;
                    }
            } else {
                const int first = 8 * kb / C::group_words;
#pragma unroll
                for (int n = 0; n < C::tiles; n++) {
                    // Column 2t + 1 against column 2t: twice the weight, and 16 bits are signed
                    const int second = C::columns == 16 && n % 2 == 1 && t == 3 ? -2 : 2;
                    float x_factor = 1;
                    if constexpr (C::bits == 16) x_factor = x_scale[min(kb, k_blocks - 1) * M + min(first_token + n / 2, M - 1)];
#pragma unroll
                    for (int i = 0; i < groups_met; i++) {
                        // Words of 32 columns of this group in the k-block: bits i of every byte
                        const int begin = min(max((first + i) * C::group_words - 8 * kb, 0), 8);
                        const int end = min((first + i + 1) * C::group_words - 8 * kb, 8);
                        const unsigned mask = 0x01010101u * ((1u << end) - (1u << begin));
                        const uint2 masked = make_uint2(fragment[b][n].x & mask, fragment[b][n].y & mask);
                        int ones[4] = {};
                        mma_b1(ones, make_uint4(~0u, ~0u, ~0u, ~0u), masked);
                        int sum[4] = {};
#pragma unroll
                        for (int p = 0; p < C::planes; p++) {
                            int product[4] = {};
                            mma_b1(product, planes[slot][p], masked);
#pragma unroll
                            for (int e = 0; e < 4; e++) sum[e] += product[e] << p;
                        }
                        const int x_bits = ones[0] + second * ones[1];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const Factor factor = factors[slot][i][half];
                            const int value = sum[2 * half] + second * sum[2 * half + 1] - factor.zero * x_bits;
                            sums[n][half] += factor.scale * x_factor * float(value);
                        }
                    }
                }
            }
            if (b + C::depth < C::x_blocks) load(slot, row_tile, b + C::depth);
            else load(slot, row_tile + gridDim.x, b + C::depth - C::x_blocks);
        }

        // The columns of a token together: in a lane, over the lanes of a quad, and over the two tiles of 16 bits
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Sum value[C::tiles];
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                if constexpr (by_plane)
#pragma unroll
                    for (int p = 0; p < C::planes; p++)
                        sums[n][half] += (plane_sums[n][p][2 * half] + 2 * plane_sums[n][p][2 * half + 1]) << p;
                value[n] = sums[n][half] * Sum(1 << (2 * t % C::columns + (C::columns == 16 ? n % 2 * 8 : 0)));
                if constexpr (C::columns >= 4) value[n] += __shfl_xor_sync(~0u, value[n], 1);
                if constexpr (C::columns >= 8) value[n] += __shfl_xor_sync(~0u, value[n], 2);
            }
            const int row = 8 * half + g;
            if constexpr (C::columns == 16) {
#pragma unroll
                for (int n = 0; n < C::tiles; n += 2)
                    if (t == 0) partial[parity][warp][n / 2][row] = value[n] + value[n + 1];
            } else {
                constexpr int lanes = C::columns / 2;  // that share a token
#pragma unroll
                for (int n = 0; n < C::tiles; n++)
                    if (t % lanes == 0) partial[parity][warp][(8 / C::columns) * n + t / lanes][row] = value[n];
            }
        }
        __syncthreads();

        for (int at = threadIdx.x; at < tokens * 16; at += 32 * C::warps) {
            const int m = first_token + at / 16;
            if (m >= M || n_out >= N) continue;
            Sum sum = 0;
#pragma unroll
            for (int w = 0; w < C::warps; w++) sum += partial[parity][w][at / 16][at % 16];
            float value;
            if constexpr (C::bits == 16) {
                value = __fmul_rn(sum, scale_out);
            } else {
                const float scale = C::fused ? grid.scale : x_scale[m];
                const int zero = C::fused ? grid.zero : x_zero[m];
                if constexpr (C::in_floats) {
                    value = output_grouped(sum, offset_out, zero, scale);
                } else {
                    value = output_per_channel(sum, zero_out, sum_out, scale_out, zero, C::fused ? fused_sum : x_sum[m], scale);
                }
            }
            y[(long long)m * N + n_out] = from_float<T>(bias ? __fadd_rn(value, bias[n_out]) : value);
        }
    }
}
