// Codes of weights as pairs of 16-bit floats, centered (q - z), exactly.
#pragma once
#include "common.cuh"

// q up to `most` in the low bits of `base` is base + q, and a difference of integers is exact up to that much
template <class T> struct Pairs;
#define ABQ_FLOAT_PAIRS(T, suffix, base_bits, most_of_base)                           \
    template <> struct Pairs<T> {                                                     \
        static constexpr unsigned base = base_bits;                                   \
        static constexpr int most = most_of_base;                                     \
        static __device__ unsigned subtract(unsigned a, unsigned b) {                 \
            asm("sub.rn." suffix " %0, %0, %1;" : "+r"(a) : "r"(b));                  \
            return a;                                                                 \
        }                                                                             \
        static __device__ unsigned multiply(unsigned a, unsigned b) {                 \
            asm("mul.rn." suffix " %0, %0, %1;" : "+r"(a) : "r"(b));                  \
            return a;                                                                 \
        }                                                                             \
    };
ABQ_FLOAT_PAIRS(half_t, "f16x2", 0x64006400, 1023)
ABQ_FLOAT_PAIRS(bf16_t, "bf16x2", 0x43004300, 127)
#undef ABQ_FLOAT_PAIRS

// base + zero, twice: what `centered_pair` subtracts
template <class T> __device__ inline unsigned zero_pair(int zero) { return Pairs<T>::base + unsigned(zero) * 0x10001u; }

// A constant that the compiler does not know: of two in one instruction, it would load one anew every time
__device__ inline unsigned unknown_constant(unsigned constant) { return constant + (blockDim.z - 1); }

// base + bytes 0 and 1 (half 0) or 2 and 3 (half 1)
__device__ inline unsigned pair_of_bytes(unsigned bytes, int half, unsigned base) {
    return __byte_perm(bytes, base, half ? 0x5352 : 0x5150);
}

// Two of four codes, centered; base: `unknown_constant(Pairs<T>::base)`
template <class T> __device__ inline unsigned centered_pair(unsigned codes, int half, unsigned zero, unsigned base) {
    return Pairs<T>::subtract(pair_of_bytes(codes, half, base), zero);
}
