// Bit-planes -> the weight in floating point, row-major [N, K]: (code - zero) * scale in fp32, rounded once to T.
#pragma once

#include "codes.cuh"

template <class T> struct alignas(4 * sizeof(T)) Four {
    T element[4];
};

// One warp a tile of 16 rows and 256 columns. C::in_fours: K and groups are multiples of four columns.
template <class C> __global__ void __launch_bounds__(32 * C::warps) dequantize(
    const uint4* weight, const float* w_scale, const void* w_zero, typename C::T* out, int N, int K, int k_blocks, int row_tiles) {
    using T = typename C::T;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kb = blockIdx.x * C::warps + threadIdx.x / 32, tile = blockIdx.y;
    if (kb >= k_blocks) return;
    const uint4* from = weight + ((long long)tile * k_blocks + kb) * C::planes * 32 + lane;
    uint4 planes[C::planes];
#pragma unroll
    for (int p = 0; p < C::planes; p++) planes[p] = load_streaming(from + p * 32);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int n = tile * 16 + g + 8 * half;
        if (n >= N) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int group = C::grouped ? (8 * kb + i) / C::group_words : 0;
            const bool inside = quad_source<C::group_size, C::group_padded, false>(256 * kb + 32 * i, K).count > 0;
            const long long at = (long long)group * row_tiles * 16 + n;
            const float scale = inside ? w_scale[at] : 0;
            int zero = 0;
            if (inside) zero = C::grouped ? static_cast<const unsigned char*>(w_zero)[at] : static_cast<const int*>(w_zero)[at];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int padded = 256 * kb + 32 * i + 16 * h + 4 * t;
                Four<T> four;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    int code = 0;
#pragma unroll
                    for (int p = 0; p < C::planes; p++) {
                        unsigned word = h ? (half ? planes[p].w : planes[p].z) : (half ? planes[p].y : planes[p].x);
                        code |= (word >> (i + 8 * j) & 1) << p;
                    }
                    four.element[j] = from_float<T>(__fmul_rn(float(code - zero), scale));
                }
                const QuadSource to = quad_source<C::group_size, C::group_padded, false>(padded, K);
                T* address = out + (long long)n * K + to.source;
                if constexpr (C::in_fours) {
                    if (to.count) *reinterpret_cast<Four<T>*>(address) = four;
                } else {
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        if (j < to.count) address[j] = four.element[j];
                }
            }
        }
    }
}
