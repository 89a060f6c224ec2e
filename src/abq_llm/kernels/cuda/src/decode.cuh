// y[M, N] = x W^T for few tokens, by binary tensor cores:
//
//     sum_k q_w q_x = sum_p sum_j 2^(p + j) popcount(plane p of W & plane j of x)
//
// The bit-planes of the tokens are the columns of the product: with 8 bits, one token fills the 8 columns of `mma_b1`, so
// its cost does not depend on how many bits x has, and the planes of W come from memory as they are multiplied: no
// expansion, no shared memory. Warps of a block share its rows and split its columns k.
//
//   C::columns    of a token in the product: its bits, rounded up to 2, 4, 8 or 16
//   C::tiles      of 8 columns; a block does tiles * 8 / columns tokens
//   C::fused      x is quantized here, by every block anew (one token): no kernel before this one, no wait for it
//   C::in_floats  groups, or 16-bit x with a scale for every 256 columns: sums are scaled and added in fp32 block by block
#pragma once

#include "codes.cuh"
#include "epilogue.cuh"

template <class C> struct Decode {
    using T = typename C::T;
    using Sum = typename C::Sum;  // int, or float if C::in_floats
    static constexpr int rows = 16 * C::row_tiles;
    static constexpr int tokens = C::tiles * 8 / C::columns;
    static constexpr bool by_plane = !C::in_floats && C::row_tiles * C::tiles * C::planes <= 16;  // sums fit in registers
};

template <class C> __global__ void __launch_bounds__(32 * C::warps) decode(
    const uint4* weight, const void* x, const float* w_scale, const void* w_zero, const void* w_sum, const float* x_scale,
    const int* x_zero, const int* x_sum, const float* bias, typename C::T* y, int M, int N, int K, int k_blocks, int x_tiles,
    int row_tiles, int groups) {
    using D = Decode<C>;
    using T = typename C::T;
    using Sum = typename C::Sum;
    __shared__ Sum partial[C::warps][D::tokens][D::rows];
    __shared__ float lows[C::warps], highs[C::warps];
    __shared__ int fused_sum;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first_row_tile = blockIdx.x * C::row_tiles, first_tile = blockIdx.y * C::tiles;
    const int padded_rows = row_tiles * 16;

    uint4 next[C::depth][C::row_tiles][C::planes];
    auto load = [&](int kb0) {
#pragma unroll
        for (int d = 0; d < C::depth; d++)
#pragma unroll
            for (int r = 0; r < C::row_tiles; r++) {
                int kb = kb0 + d * C::warps, tile = min(first_row_tile + r, row_tiles - 1);
                const uint4* from = weight + ((long long)tile * k_blocks + kb) * C::planes * 32 + lane;
#pragma unroll
                for (int p = 0; p < C::planes; p++)
                    next[d][r][p] = kb < k_blocks ? load_streaming(from + p * 32) : make_uint4(0, 0, 0, 0);
            }
    };
    load(warp);
    if (C::programmatic) grid_dependency_launch();
    if (C::programmatic) grid_dependency_wait();

    Grid grid{};
    const T* raw = static_cast<const T*>(x);
    if constexpr (C::fused) {
        if (threadIdx.x == 0) fused_sum = 0;
        float lo = 0, hi = 0;
        auto see = [&](float value) {
            lo = fminf(lo, value);
            hi = fmaxf(hi, value);
        };
        if (sizeof(T) == 2 && K % 8 == 0) {
            for (int k = threadIdx.x; k < K / 8; k += 32 * C::warps) {
                uint4 eight = reinterpret_cast<const uint4*>(x)[k];
                const T* values = reinterpret_cast<const T*>(&eight);
#pragma unroll
                for (int i = 0; i < 8; i++) see(to_float(values[i]));
            }
        } else {
            for (int k = threadIdx.x; k < K; k += 32 * C::warps) see(to_float(raw[k]));
        }
        warp_range(lo, hi);
        if (lane == 0) {
            lows[warp] = lo;
            highs[warp] = hi;
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < C::warps; w++) {
            lo = fminf(lo, lows[w]);
            hi = fmaxf(hi, highs[w]);
        }
        grid = choose_grid<C::bits, C::symmetric>(lo, hi);
    }

    int code_sum = 0;
    auto fragment = [&](int kb, int tile) -> uint2 {
        if constexpr (C::fused) {
            unsigned low = 0, high = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int column = source_column<C::group_size, C::group_padded>(256 * kb + 32 * i + first_column(lane), K);
                unsigned code = column >= 0 ? code_of<C::bits>(to_float(raw[column]), grid) : 0;
                code_sum += code;
                if (i < 4) low |= code << (8 * i);
                else high |= code << (8 * (i - 4));
            }
            return plane_fragment(low, high, lane);
        } else {
            return static_cast<const uint2*>(x)[((long long)kb * x_tiles + first_tile + tile) * 32 + lane];
        }
    };

    int by_plane[D::by_plane ? C::row_tiles : 1][D::by_plane ? C::tiles : 1][D::by_plane ? C::planes : 1][4] = {};
    int sums[C::row_tiles][C::tiles][4] = {};
    float scaled[C::row_tiles][C::tiles][2] = {};  // columns 2t and 2t + 1 together; rows g and g + 8

    for (int kb0 = warp; kb0 < k_blocks; kb0 += C::depth * C::warps) {
        uint4 planes[C::depth][C::row_tiles][C::planes];
#pragma unroll
        for (int d = 0; d < C::depth; d++)
#pragma unroll
            for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                for (int p = 0; p < C::planes; p++) planes[d][r][p] = next[d][r][p];
        load(kb0 + C::depth * C::warps);
#pragma unroll
        for (int d = 0; d < C::depth; d++) {
            const int kb = kb0 + d * C::warps;
            if (kb >= k_blocks) break;
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                const uint2 b = fragment(kb, n);
                if constexpr (D::by_plane) {
#pragma unroll
                    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                        for (int p = 0; p < C::planes; p++) mma_b1(by_plane[r][n][p], planes[d][r][p], b);
                } else if constexpr (!C::in_floats) {
#pragma unroll
                    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                        for (int p = 0; p < C::planes; p++) {
                            int product[4] = {};
                            mma_b1(product, planes[d][r][p], b);
#pragma unroll
                            for (int e = 0; e < 4; e++) sums[r][n][e] += product[e] << p;
                        }
                } else {
                    const int first = 8 * kb / C::group_words, last = min((8 * kb + 7) / C::group_words, groups - 1);
                    const bool sign = C::columns == 16 && (first_tile + n) % 2 == 1 && t == 3;
                    const int second = sign ? -2 : 2;  // the weight of column 2t + 1 against column 2t: 16 bits are signed
                    float x_factor = 1;
                    if constexpr (C::bits == 16) x_factor = x_scale[kb * M + min((first_tile + n) / 2, M - 1)];
                    for (int group = first; group <= last; group++) {
                        // words of 32 columns of this group in the block: bits i of every byte
                        const int begin = max(group * C::group_words - 8 * kb, 0);
                        const int end = min((group + 1) * C::group_words - 8 * kb, 8);
                        const unsigned mask = 0x01010101u * ((1u << end) - (1u << begin));
                        const uint2 masked = make_uint2(b.x & mask, b.y & mask);
                        int ones[4] = {};
                        mma_b1(ones, make_uint4(~0u, ~0u, ~0u, ~0u), masked);
                        const int x_bits = ones[0] + second * ones[1];
#pragma unroll
                        for (int r = 0; r < C::row_tiles; r++) {
                            int sum[4] = {};
#pragma unroll
                            for (int p = 0; p < C::planes; p++) {
                                int product[4] = {};
                                mma_b1(product, planes[d][r][p], masked);
#pragma unroll
                                for (int e = 0; e < 4; e++) sum[e] += product[e] << p;
                            }
                            const int row = min(first_row_tile + r, row_tiles - 1) * 16 + g;
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                const int at = row + 8 * half;
                                int zero;
                                float factor = x_factor;
                                if constexpr (C::grouped) {
                                    zero = static_cast<const unsigned char*>(w_zero)[(long long)group * padded_rows + at];
                                    factor *= w_scale[(long long)group * padded_rows + at];
                                } else {
                                    zero = static_cast<const int*>(w_zero)[at];
                                }
                                scaled[r][n][half] += factor * float(sum[2 * half] + second * sum[2 * half + 1] - zero * x_bits);
                            }
                        }
                    }
                }
            }
        }
    }

    // Columns of a token together, first within a lane, then over the lanes of a quad
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            Sum value[C::tiles];
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                if constexpr (C::in_floats) {
                    value[n] = scaled[r][n][half] * float(1 << (2 * t % C::columns) << (C::columns == 16 ? n % 2 * 8 : 0));
                } else {
                    if constexpr (D::by_plane)
#pragma unroll
                        for (int p = 0; p < C::planes; p++)
#pragma unroll
                            for (int e = 0; e < 2; e++) sums[r][n][2 * half + e] += by_plane[r][n][p][2 * half + e] << p;
                    value[n] = (sums[r][n][2 * half] + 2 * sums[r][n][2 * half + 1]) << (2 * t % C::columns);
                }
                if constexpr (C::columns >= 4) value[n] += __shfl_xor_sync(~0u, value[n], 1);
                if constexpr (C::columns >= 8) value[n] += __shfl_xor_sync(~0u, value[n], 2);
            }
            const int row = 16 * r + 8 * half + g;
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                if constexpr (C::columns == 16) {
                    if (n % 2 == 0 && t == 0) partial[warp][n / 2][row] = value[n] + value[n + 1 < C::tiles ? n + 1 : n];
                } else {
                    constexpr int lanes = C::columns / 2;  // that share a token
                    if (t % lanes == 0) partial[warp][(8 / C::columns) * n + t / lanes][row] = value[n];
                }
            }
        }
    if constexpr (C::fused && !C::in_floats) {
        code_sum = warp_sum(code_sum);
        if (lane == 0) atomicAdd(&fused_sum, code_sum);
    }
    __syncthreads();

    for (int at = threadIdx.x; at < D::tokens * D::rows; at += 32 * C::warps) {
        const int row = at % D::rows, n = first_row_tile * 16 + row, m = first_tile * 8 / C::columns + at / D::rows;
        if (m >= M || n >= N) continue;
        Sum sum = 0;
#pragma unroll
        for (int w = 0; w < C::warps; w++) sum += partial[w][at / D::rows][row];
        float value;
        if constexpr (C::bits == 16) {
            value = C::grouped ? sum : __fmul_rn(sum, w_scale[n]);
        } else {
            const float scale = C::fused ? grid.scale : x_scale[m];
            const int zero = C::fused ? grid.zero : x_zero[m];
            if constexpr (C::grouped) {
                value = output_grouped(sum, static_cast<const float*>(w_sum)[n], zero, scale);
            } else {
                const int total = C::fused ? fused_sum : x_sum[m];
                value = output_per_channel(
                    sum, static_cast<const int*>(w_zero)[n], static_cast<const int*>(w_sum)[n], w_scale[n], zero, total, scale);
            }
        }
        y[(long long)m * N + n] = from_float<T>(bias ? __fadd_rn(value, bias[n]) : value);
    }
}
