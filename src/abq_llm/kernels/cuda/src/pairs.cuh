// Codes of weights as pairs of 16-bit floats, centered (q - z), exactly.
#pragma once
#include "common.cuh"

// q up to `most` in the low bits of `base` is base + q, and a difference of integers is exact up to that much
template <class T> struct Pairs;
template <> struct Pairs<half_t> {
    static constexpr unsigned base = 0x64006400;
    static constexpr int most = 1023;
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
    static constexpr int most = 127;
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

// Bytes 0 and 1 (half 0) or 2 and 3 (half 1) of four codes
template <class T> __device__ inline unsigned centered_pair(unsigned codes, int half, unsigned zero) {
    return Pairs<T>::subtract(__byte_perm(codes, Pairs<T>::base, half ? 0x5352 : 0x5150), zero);
}
// The same, with a second byte of each code
__device__ inline unsigned centered_pair_of_wide(unsigned low, unsigned high, int half, unsigned zero) {
    return Pairs<half_t>::subtract(__byte_perm(low, high, half ? 0x7362 : 0x5140) | Pairs<half_t>::base, zero);
}

__device__ inline unsigned bf16_pair(unsigned pair) {  // of a pair of fp16
    const float low = to_float(half_t{(unsigned short)pair}), high = to_float(half_t{(unsigned short)(pair >> 16)});
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// Pairs of T of codes of up to nine planes, of which `ninth` has the bytes of the last. Eight are too many for bf16 itself: such
// codes are centered in fp16, and |q - z| up to 256 is exact in bf16, too.
template <class T, int planes> struct Centered {
    using In = typename Either<(1 << planes) - 1 <= Pairs<T>::most, T, half_t>::type;
    static __device__ unsigned zero(int z) { return zero_pair<In>(z); }
    static __device__ unsigned pair(unsigned codes, unsigned ninth, int half, unsigned zero) {
        unsigned result;
        if constexpr (planes > 8)
            result = centered_pair_of_wide(codes, ninth, half, zero);
        else
            result = centered_pair<In>(codes, half, zero);
        if constexpr (Pairs<T>::most < Pairs<In>::most) result = bf16_pair(result);
        return result;
    }
};
