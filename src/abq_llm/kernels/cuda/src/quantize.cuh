// Per-token quantization of activations, packed as the product that follows wants them; one block of threads a token.
//
// The token is read twice (the second time from a cache): for its range, and to write codes. Before that, it may be
// normalized (RMSNorm) or be the product SiLU(gate) * up; both round to T where Transformers does.
//
//   C::layout   0  fragments   uint2 [KB][tiles][32]            columns of `mma_b1`: `C::columns` planes of a token
//               1  bytes       uchar [16 KB][tiles][8][16]      16 columns of 8 tokens: a core matrix of wgmma
//               2  plane bytes uchar [KB][bits][2][tiles][8][16]
//   C::bits     1..8, or 16: signed, with a scale for every block of 256 columns (layout 0 only)
#pragma once

#include "codes.cuh"

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

template <class C> struct Source {
    using T = typename C::T;
    const T *x, *other;  // other: the norm's weight [K], or up [M, K]
    float inverse_rms;

    __device__ float operator()(int column) const {
        float value = to_float(x[column]);
        if constexpr (C::prologue == 1) {
            float normalized = to_float(from_float<T>(value * inverse_rms));
            value = to_float(from_float<T>(normalized * to_float(other[column])));
        } else if constexpr (C::prologue == 2) {
            float activated = to_float(from_float<T>(silu(value)));
            value = to_float(from_float<T>(activated * to_float(other[column])));
        }
        return value;
    }
};

template <class C> __global__ void __launch_bounds__(C::threads) quantize(
    const typename C::T* x, const typename C::T* other, float epsilon, unsigned* codes, float* scales, int* zeros, int* sums,
    int* group_sums, int tokens, int columns, int k_blocks, int tiles, int groups) {
    constexpr int warps = C::threads / 32, code_bits = C::bits == 16 ? 8 : C::bits;
    __shared__ float lows[warps], highs[warps];
    __shared__ int total;
    extern __shared__ int group_totals[];  // [groups], if they are asked for
    const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) total = 0;
    if constexpr (C::group_sums)
        for (int g = threadIdx.x; g < groups; g += C::threads) group_totals[g] = 0;
    grid_dependency_wait();
    grid_dependency_launch();  // after the wait: what the product reads before its own may come from our predecessor

    Source<C> source{x + (long long)token * columns, other, 1.0f};
    if constexpr (C::prologue == 2) source.other += (long long)token * columns;
    if constexpr (C::prologue == 1) {
        float squares = 0;
        for (int k = threadIdx.x; k < columns; k += C::threads) {
            float value = to_float(source.x[k]);
            squares += value * value;
        }
#pragma unroll
        for (int other_lane = 16; other_lane > 0; other_lane /= 2) squares += __shfl_xor_sync(~0u, squares, other_lane);
        if (lane == 0) lows[warp] = squares;
        __syncthreads();
        squares = 0;
#pragma unroll
        for (int w = 0; w < warps; w++) squares += lows[w];
        source.inverse_rms = rsqrtf(squares / columns + epsilon);
        __syncthreads();
    }

    Grid grid{};
    if constexpr (C::bits < 16) {
        float lo = 0, hi = 0;
        for (int k0 = threadIdx.x; k0 < columns; k0 += 8 * C::threads) {
            float value[8];  // eight loads under way
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = source(min(k0 + i * C::threads, columns - 1));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                lo = fminf(lo, value[i]);
                hi = fmaxf(hi, value[i]);
            }
        }
        warp_range(lo, hi);
        if (lane == 0) {
            lows[warp] = lo;
            highs[warp] = hi;
        }
        __syncthreads();
#pragma unroll
        for (int w = 0; w < warps; w++) {
            lo = fminf(lo, lows[w]);
            hi = fmaxf(hi, highs[w]);
        }
        grid = choose_grid<code_bits, C::symmetric>(lo, hi);
    }

    int sum = 0;
    for (int kb = warp; kb < k_blocks; kb += warps) {
        unsigned code[8];
        int column[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {  // bytes: neighbours in one lane; planes: neighbours in neighbouring lanes
            int padded = 256 * kb + (C::layout == 1 ? 8 * lane + i : 32 * i + first_column(lane));
            column[i] = source_column<C::group_size, C::group_padded>(padded, columns);
        }
        if constexpr (C::bits == 16) {
            float value[8], lo = 0, hi = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                value[i] = column[i] >= 0 ? source(column[i]) : 0;
                lo = fminf(lo, value[i]);
                hi = fmaxf(hi, value[i]);
            }
            warp_range(lo, hi);
            float scale = fmaxf(fmaxf(hi, -lo) / 32767.0f, 1e-35f), reciprocal = 1.0f / scale;
            if (lane == 0) scales[kb * tokens + token] = scale;
#pragma unroll
            for (int i = 0; i < 8; i++) code[i] = unsigned(int(rintf(value[i] * reciprocal)));
        } else {
            float value[8];
#pragma unroll
            for (int i = 0; i < 8; i++) value[i] = source(max(column[i], 0));
            int block_sum = 0;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                code[i] = column[i] >= 0 ? code_of<code_bits>(value[i], grid) : 0;
                block_sum += code[i];
            }
            sum += block_sum;
            if constexpr (C::group_sums) {  // a lane's eight neighbours are in one group: it is a multiple of 32
                int group = (256 * kb + 8 * lane) / C::group_padded;
                if (group < groups) atomicAdd(&group_totals[group], block_sum);
            }
        }
#pragma unroll
        for (int byte = 0; byte < (C::bits == 16 ? 2 : 1); byte++) {
            unsigned low = 0, high = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                low |= (code[i] >> (8 * byte) & 0xFF) << (8 * i);
                high |= (code[i + 4] >> (8 * byte) & 0xFF) << (8 * i);
            }
            if constexpr (C::layout == 1) {
                int chunk = 16 * kb + lane / 2;
                uint2* to = reinterpret_cast<uint2*>(codes) + (((long long)chunk * tiles + token / 8) * 8 + token % 8) * 2;
                to[lane % 2] = make_uint2(low, high);
            } else {
                uint2 words = plane_fragment(low, high, lane);
                int plane = lane / 4, t = lane % 4;
                if constexpr (C::layout == 0) {
                    int at = token * C::columns + 8 * byte + plane;  // the column of the product
                    uint2* to = reinterpret_cast<uint2*>(codes) + ((long long)kb * tiles + at / 8) * 32;
                    if (plane < C::columns) to[4 * (at % 8) + t] = words;
                } else if (plane < C::bits) {
                    unsigned* to = codes + (((long long)kb * C::bits + plane) * 2 * tiles + token / 8) * 32 + token % 8 * 4 + t;
                    to[0] = words.x;
                    to[tiles * 32] = words.y;
                }
            }
        }
    }
    if constexpr (C::bits < 16) {
        sum = warp_sum(sum);
        if (lane == 0) atomicAdd(&total, sum);
        __syncthreads();
        if (threadIdx.x == 0) {
            scales[token] = grid.scale;
            zeros[token] = grid.zero;
            sums[token] = total;
        }
        if constexpr (C::group_sums)
            for (int g = threadIdx.x; g < groups; g += C::threads) group_sums[(long long)g * tiles * 8 + token] = group_totals[g];
    }
}
