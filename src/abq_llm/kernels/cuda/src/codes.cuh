// Activations -> codes, in the fp32 order of `abq_llm/quantizers.py`, and codes -> fragments of bit-planes.
#pragma once

#include "common.cuh"

struct Grid {  // x ~ (code - zero) * scale
    float scale, reciprocal;
    int zero;
};

// 1 / x and a / b to nearest, as IEEE's division is, where nothing overflows: b's reciprocal is given, the remainder corrects
// the quotient. __fdiv_rn adds a check and a call, and every thread of a block waits for them.
__device__ inline float reciprocal_of(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    r = __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
    return __fmaf_rn(__fmaf_rn(-x, r, 1.0f), r, r);
}
__device__ inline float quotient(float a, float b, float reciprocal) {
    const float q = __fmul_rn(a, reciprocal);
    return __fmaf_rn(__fmaf_rn(-q, b, a), reciprocal, q);
}

// The integer nearest to x, ties to even, for |x| < 2^22: the sum with 3 * 2^22 leaves it in the low bits
__device__ inline int nearest(float x) { return __float_as_int(__fadd_rn(x, 12582912.0f)) - 0x4B400000; }

// From the ends of a token's range, which always holds zero, as `choose_qparams` in abq_llm/quantizers.py
template <int bits, bool symmetric> __device__ inline Grid choose_grid(float lo, float hi) {
    constexpr int qmax = (1 << bits) - 1, fixed_zero = 1 << (bits - 1);
    constexpr float min_scale = 1.0f / (1 << 20);
    Grid grid;
    if constexpr (symmetric) {
        constexpr int steps = qmax - fixed_zero > 0 ? qmax - fixed_zero : 1;
        grid.scale = fmaxf(quotient(fmaxf(hi, -lo), float(steps), 1.0f / steps), min_scale);
        grid.reciprocal = reciprocal_of(grid.scale);
        grid.zero = fixed_zero;
    } else {
        grid.scale = fmaxf(quotient(__fsub_rn(hi, lo), float(qmax), 1.0f / qmax), min_scale);
        grid.reciprocal = reciprocal_of(grid.scale);
        grid.zero = min(max(nearest(__fmul_rn(-lo, grid.reciprocal)), 0), qmax);
    }
    return grid;
}

// The code of x before it is cut to 0 .. 2^bits - 1
__device__ inline int code_of(float x, Grid grid) { return nearest(__fmul_rn(x, grid.reciprocal)) + grid.zero; }

// Bytes 0..3 of the result: a, b, c, d, cut to 0 .. 255
__device__ inline unsigned saturated_bytes(int a, int b, int c, int d) {
    unsigned bytes;
    asm("{.reg .b32 high; cvt.pack.sat.u8.s32.b32 high, %4, %3, 0; cvt.pack.sat.u8.s32.b32 %0, %2, %1, high;}"
        : "=r"(bytes)
        : "r"(a), "r"(b), "r"(c), "r"(d));
    return bytes;
}

// Four neighbouring values of a token, as they lie in memory
template <class T> struct Quad {  // of 16 bits each
    uint2 words;
    __device__ float value(int i) const {
        const unsigned word = i < 2 ? words.x : words.y;
        return to_float(T{(unsigned short)(i % 2 ? word >> 16 : word)});
    }
    __device__ void set(int i, T x) {
        unsigned& word = i < 2 ? words.x : words.y;
        word |= unsigned(x.bits) << (i % 2 * 16);
    }
};
template <> struct Quad<float> {
    float4 values;
    __device__ float value(int i) const { return i == 0 ? values.x : i == 1 ? values.y : i == 2 ? values.z : values.w; }
    __device__ void set(int i, float x) { (i == 0 ? values.x : i == 1 ? values.y : i == 2 ? values.z : values.w) = x; }
};

// Four columns of a k-block, in a token: `count` of them are there, from `source` on
struct QuadSource {
    int source, count;
    unsigned byte_mask;  // of those that are there
};

// Padded groups: group g of `size` columns starts at g * padded. `whole`: no column is padding.
template <int size, int padded, bool whole> __device__ inline QuadSource quad_source(int column, int columns) {
    if constexpr (whole) return {column, 4, ~0u};
    int inside = 4;
    if constexpr (size != padded) {
        const int group = column / padded, offset = column % padded;
        column = group * size + offset;
        inside = size - offset;
    }
    // No `max(0, min(available, 4)) == 4`: NVRTC 13.0 compiles it to a comparison that holds for negative ones, too.
    const int available = min(inside, columns - column);
    const unsigned all = ~0u;
    if (available >= 4) return {column, 4, all};
    return available > 0 ? QuadSource{column, available, all >> (32 - 8 * available)} : QuadSource{0, 0, 0};
}

// `aligned`: four columns are inside or outside as one, and their address is a multiple of their size
template <class T, bool aligned> __device__ inline Quad<T> load_quad(const T* x, QuadSource from) {
    if constexpr (aligned) {
        return *reinterpret_cast<const Quad<T>*>(x + from.source);  // of outsiders, too: nothing waits for a condition
    } else {
        Quad<T> quad{};
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (i < from.count) quad.set(i, x[from.source + i]);
        return quad;
    }
}

// Ends of a range that holds zero. 16-bit values are compared two at a time.
template <class T> struct Range {
    unsigned top = 0, bottom = 0;
    __device__ void add(const Quad<T>& quad) {
        top = larger(larger(top, quad.words.x), quad.words.y);
        bottom = smaller(smaller(bottom, quad.words.x), quad.words.y);
    }
    __device__ float hi() const { return fmaxf(first(top), second(top)); }
    __device__ float lo() const { return fminf(first(bottom), second(bottom)); }

  private:
    static __device__ float first(unsigned pair) { return to_float(T{(unsigned short)pair}); }
    static __device__ float second(unsigned pair) { return to_float(T{(unsigned short)(pair >> 16)}); }
    static __device__ unsigned larger(unsigned a, unsigned b);
    static __device__ unsigned smaller(unsigned a, unsigned b);
};
#define ABQ_PAIRS(T, name, instruction)                                              \
    template <> __device__ inline unsigned Range<T>::name(unsigned a, unsigned b) { \
        asm(instruction " %0, %0, %1;" : "+r"(a) : "r"(b));                         \
        return a;                                                                    \
    }
ABQ_PAIRS(half_t, larger, "max.f16x2")
ABQ_PAIRS(half_t, smaller, "min.f16x2")
ABQ_PAIRS(bf16_t, larger, "max.bf16x2")
ABQ_PAIRS(bf16_t, smaller, "min.bf16x2")
#undef ABQ_PAIRS
template <> struct Range<float> {
    float top = 0, bottom = 0;
    __device__ void add(const Quad<float>& quad) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            top = fmaxf(top, quad.value(i));
            bottom = fminf(bottom, quad.value(i));
        }
    }
    __device__ float hi() const { return top; }
    __device__ float lo() const { return bottom; }
};

// The codes of four values, a byte each; zeros from `count` on
template <int bits, class T> __device__ inline unsigned codes_of(const Quad<T>& quad, QuadSource from, Grid grid) {
    constexpr int qmax = (1 << bits) - 1;
    int code[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        code[i] = code_of(quad.value(i), grid);
        if constexpr (bits < 8) code[i] = min(code[i], qmax);
    }
    return saturated_bytes(code[0], code[1], code[2], code[3]) & from.byte_mask;
}

__device__ inline int sum_of_bytes(unsigned bytes, int sum) {
    asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(bytes), "r"(0x01010101u));
    return sum;
}

// The largest magnitude of a warp's values: bits of what is not negative order as integers do
__device__ inline float warp_max(float value) {
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fabsf(value))));
}

__device__ inline void warp_range(float& lo, float& hi) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, lane));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, lane));
    }
}

// The column of a k-block where the four begin whose codes lane 4 i + t gives to `plane_fragment` as word h
__device__ inline int fragment_column(int lane, int h) { return 32 * (lane / 4) + 16 * h + 4 * (lane % 4); }

// A step of the transposition of `plane_fragment`: half of each word stays, the other halves are exchanged as one word
template <int distance> __device__ inline void exchange_lanes(unsigned& word0, unsigned& word1, int lane) {
    constexpr unsigned low = distance == 4 ? 0x0F0F0F0Fu : distance == 2 ? 0x33333333u : 0x55555555u;
    const bool upper = lane / 4 & distance;
    const unsigned stays = upper ? ~low : low;
    const int right = upper ? 0 : distance, left = upper ? distance : 0;
    const unsigned sent = (word0 >> right & low) | (word1 << left & ~low);
    const unsigned received = __shfl_xor_sync(~0u, sent, 4 * distance);
    word0 = (word0 & stays) | (received << right & ~stays);
    word1 = (word1 & stays) | (received >> left & ~stays);
}

// Words of codes, four a byte each (columns from `fragment_column` on) -> the words of bit-plane n of the k-block, for lane
// 4 n + t: bit i + 8 j of word h stands for column 32 i + 16 h + 4 t + j. It is the B fragment of `mma_b1`.
//
// Each byte j of the eight lanes with the same t is transposed: bit n of lane i goes to bit i of lane n.
__device__ inline uint2 plane_fragment(unsigned word0, unsigned word1, int lane) {
    exchange_lanes<4>(word0, word1, lane);
    exchange_lanes<2>(word0, word1, lane);
    exchange_lanes<1>(word0, word1, lane);
    return make_uint2(word0, word1);
}
