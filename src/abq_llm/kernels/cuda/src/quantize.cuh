// Per-token quantization of activations, packed as the product that follows wants them; one block of threads a token.
//
// The token is read once, four neighbours at a time, and stays in registers: warp w holds k-blocks w, w + warps, ... Before
// it is quantized, it may be normalized (RMSNorm) or be the product SiLU(gate) * up; both round to T where Transformers does.
//
//   C::layout   0  fragments   uint2 [KB][tiles][32]            columns of `mma_b1`: `C::columns` planes of a token
//               1  bytes       uchar [16 KB][tiles][8][16]      16 columns of 8 tokens: a core matrix of wgmma
//               2  plane bytes uchar [KB][bits][2][tiles][8][16]
//   C::bits     1..8, or 16: signed, with a scale for every block of 256 columns (layout 0 only)
//   C::held     k-blocks of a warp
//   C::whole    there are no columns but those of x, and every warp has C::held k-blocks
#pragma once

#include "codes.cuh"

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// What is quantized: of the token and the norm's weight, or of gate and up
template <class T, int prologue>
__device__ inline Quad<T> after_prologue(const Quad<T>& x, const Quad<T>& other, float inverse_rms) {
    Quad<T> quad{};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float factor = prologue == 1 ? x.value(i) * inverse_rms : silu(x.value(i));
        quad.set(i, from_float<T>(to_float(from_float<T>(factor)) * other.value(i)));
    }
    return quad;
}

template <class C> __global__ void __launch_bounds__(C::threads) quantize(
    const typename C::T* x, const typename C::T* other, float epsilon, unsigned* codes, float* scales, int* zeros, int* sums,
    int* group_sums, int tokens, int columns, int k_blocks, int tiles, int groups) {
    using T = typename C::T;
    constexpr int warps = C::threads / 32;
    __shared__ float lows[warps], highs[warps];
    __shared__ int total;
    extern __shared__ int group_totals[];  // [groups], if they are asked for
    const int token = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) total = 0;
    if constexpr (C::group_sums)
        for (int g = threadIdx.x; g < groups; g += C::threads) group_totals[g] = 0;
    grid_dependency_launch();
    grid_dependency_wait();

    // Bytes: neighbours in one lane; planes: neighbours in neighbouring lanes
    auto source = [&](int b, int h) {
        const int column = C::layout == 1 ? 8 * lane + 4 * h : fragment_column(lane, h);
        return quad_source<C::group_size, C::group_padded, C::whole>(256 * (b * warps + warp) + column, columns);
    };
    Quad<T> quad[C::held][2], second[C::held][2];
#pragma unroll
    for (int b = 0; b < C::held; b++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            quad[b][h] = load_quad<T, C::aligned>(x + (long long)token * columns, source(b, h));
            if constexpr (C::prologue == 1) second[b][h] = load_quad<T, C::aligned>(other, source(b, h));
            if constexpr (C::prologue == 2) second[b][h] = load_quad<T, C::aligned>(other + (long long)token * columns, source(b, h));
        }

    float inverse_rms = 1;
    if constexpr (C::prologue == 1) {
        float squares = 0;
#pragma unroll
        for (int b = 0; b < C::held; b++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float value = quad[b][h].value(i);
                    if (i < source(b, h).count) squares += value * value;
                }
#pragma unroll
        for (int other_lane = 16; other_lane > 0; other_lane /= 2) squares += __shfl_xor_sync(~0u, squares, other_lane);
        if (lane == 0) lows[warp] = squares;
        __syncthreads();
        squares = 0;
#pragma unroll
        for (int w = 0; w < warps; w++) squares += lows[w];
        inverse_rms = rsqrtf(squares / columns + epsilon);
        __syncthreads();
    }
    if constexpr (C::prologue != 0)
#pragma unroll
        for (int b = 0; b < C::held; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) quad[b][h] = after_prologue<T, C::prologue>(quad[b][h], second[b][h], inverse_rms);

    Grid grid{};
    if constexpr (C::bits < 16) {
        Range<T> range;
#pragma unroll
        for (int b = 0; b < C::held; b++)
#pragma unroll
            for (int h = 0; h < 2; h++) range.add(quad[b][h]);  // outsiders are values of this token, too
        const float bottom = warp_max(range.lo()), top = warp_max(range.hi());
        if (lane == 0) {
            lows[warp] = bottom;
            highs[warp] = top;
        }
        __syncthreads();
        grid = choose_grid<C::bits, C::symmetric>(-warp_max(lows[lane % warps]), warp_max(highs[lane % warps]));
    }

    int sum = 0;
#pragma unroll
    for (int b = 0; b < C::held; b++) {
        const int kb = b * warps + warp;
        if (!C::whole && kb >= k_blocks) break;
        unsigned word[C::bits == 16 ? 2 : 1][2];  // [byte of the code][h]
        if constexpr (C::bits == 16) {
            float lo = 0, hi = 0;
#pragma unroll
            for (int i = 0; i < 8; i++)
                if (i % 4 < source(b, i / 4).count) {
                    lo = fminf(lo, quad[b][i / 4].value(i % 4));
                    hi = fmaxf(hi, quad[b][i / 4].value(i % 4));
                }
            warp_range(lo, hi);
            const float scale = fmaxf(fmaxf(hi, -lo) / 32767.0f, 1e-35f), reciprocal = 1.0f / scale;
            if (lane == 0) scales[kb * tokens + token] = scale;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                unsigned code[4];
#pragma unroll
                for (int i = 0; i < 4; i++) code[i] = unsigned(int(rintf(quad[b][h].value(i) * reciprocal)));
                const unsigned first = __byte_perm(code[0], code[1], 0x5140), last = __byte_perm(code[2], code[3], 0x5140);
                word[0][h] = __byte_perm(first, last, 0x5410) & source(b, h).byte_mask;
                word[1][h] = __byte_perm(first, last, 0x7632) & source(b, h).byte_mask;
            }
        } else {
#pragma unroll
            for (int h = 0; h < 2; h++) word[0][h] = codes_of<C::bits>(quad[b][h], source(b, h), grid);
            const int block_sum = sum_of_bytes(word[0][0], sum_of_bytes(word[0][1], 0));
            sum += block_sum;
            if constexpr (C::group_sums) {  // a lane's eight neighbours are in one group: it is a multiple of 32
                const int group = (256 * kb + 8 * lane) / C::group_padded;
                if (group < groups) atomicAdd(&group_totals[group], block_sum);
            }
        }
#pragma unroll
        for (int byte = 0; byte < (C::bits == 16 ? 2 : 1); byte++) {
            if constexpr (C::layout == 1) {
                const int chunk = 16 * kb + lane / 2;
                uint2* to = reinterpret_cast<uint2*>(codes) + (((long long)chunk * tiles + token / 8) * 8 + token % 8) * 2;
                to[lane % 2] = make_uint2(word[byte][0], word[byte][1]);
            } else {
                const uint2 words = plane_fragment(word[byte][0], word[byte][1], lane);
                const int plane = lane / 4, t = lane % 4;
                if constexpr (C::layout == 0) {
                    const int at = token * C::columns + 8 * byte + plane;  // the column of the product
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
        sum = __reduce_add_sync(~0u, sum);
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
