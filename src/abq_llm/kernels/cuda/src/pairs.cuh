// Codes of weights as pairs of 16-bit floats, exactly.
//
// q < 1024 (128 for bf16) in the low bits of `base` is base + q, and a difference of integers below 2048 (256) is exact. The
// codes of eight planes in bf16 take the way through fp16.
#pragma once
#include "common.cuh"

template <class T> struct Pairs;
template <> struct Pairs<half_t> {
    static constexpr unsigned base = 0x64006400;
    static __device__ unsigned subtract(unsigned a, unsigned b) {
        asm("sub.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ unsigned multiply(unsigned a, unsigned b) {
        asm("mul.rn.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
};
template <> struct Pairs<bf16_t> {
    static constexpr unsigned base = 0x43004300;
    static __device__ unsigned subtract(unsigned a, unsigned b) {
        asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ unsigned multiply(unsigned a, unsigned b) {
        asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
};

// base + zero, twice: what `centered_pair` subtracts
template <class T> __device__ inline unsigned zero_pair(int zero) { return Pairs<T>::base + unsigned(zero) * 0x10001u; }

// Bytes 0 and 1 (half 0) or 2 and 3 (half 1) of four codes, centered
template <class T> __device__ inline unsigned centered_pair(unsigned codes, int half, unsigned zero) {
    return Pairs<T>::subtract(__byte_perm(codes, Pairs<T>::base, half ? 0x5352 : 0x5150), zero);
}

__device__ inline unsigned bf16_pair(unsigned pair) {  // of a pair of fp16
    const float low = to_float(half_t{(unsigned short)pair}), high = to_float(half_t{(unsigned short)(pair >> 16)});
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
