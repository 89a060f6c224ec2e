// Activations -> codes, in the fp32 order of `abq_llm/quantizers.py`, and codes -> fragments of bit-planes.
#pragma once

#include "common.cuh"

struct Grid {  // x ~ (code - zero) * scale
    float scale, reciprocal;
    int zero;
};

// From the ends of a token's range, which always holds zero. Divisions are IEEE's and nothing is fused.
template <int bits, bool symmetric> __device__ inline Grid choose_grid(float lo, float hi) {
    constexpr int qmax = (1 << bits) - 1, fixed_zero = 1 << (bits - 1);
    constexpr float min_scale = 1.0f / (1 << 20);
    Grid grid;
    if constexpr (symmetric) {
        constexpr int steps = qmax - fixed_zero > 0 ? qmax - fixed_zero : 1;
        grid.scale = fmaxf(__fdiv_rn(fmaxf(hi, -lo), float(steps)), min_scale);
        grid.reciprocal = __fdiv_rn(1.0f, grid.scale);
        grid.zero = fixed_zero;
    } else {
        grid.scale = fmaxf(__fdiv_rn(__fsub_rn(hi, lo), float(qmax)), min_scale);
        grid.reciprocal = __fdiv_rn(1.0f, grid.scale);
        grid.zero = int(fminf(fmaxf(rintf(__fmul_rn(-lo, grid.reciprocal)), 0.0f), float(qmax)));
    }
    return grid;
}

// Adding 3 * 2^22 rounds to an integer, ties to even, and leaves it in the low bits: cheaper than two conversions.
template <int bits> __device__ inline int code_of(float x, Grid grid) {
    constexpr int qmax = (1 << bits) - 1;
    const int rounded = __float_as_int(__fadd_rn(__fmul_rn(x, grid.reciprocal), 12582912.0f)) - 0x4B400000;
    return min(max(rounded + grid.zero, 0), qmax);
}

__device__ inline void warp_range(float& lo, float& hi) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, lane));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, lane));
    }
}

__device__ inline int warp_sum(int value) {
#pragma unroll
    for (int lane = 16; lane > 0; lane /= 2) value += __shfl_xor_sync(~0u, value, lane);
    return value;
}

// The column of a block of 256 whose codes lane 4 n + t gives to `plane_fragment`: this one and every 32nd after it
__device__ inline int first_column(int lane) {
    int n = lane / 4, t = lane % 4;
    return 16 * (n / 4) + 4 * t + n % 4;
}

// Eight codes of a lane (columns `first_column` + 32 i), as bytes -> the words of plane n of a token's block of 256
// columns, for lane 4 n + t: bit i + 8 j of word h stands for column 32 i + 16 h + 4 t + j, the B fragment of `mma_b1`.
__device__ inline uint2 plane_fragment(unsigned low, unsigned high, int lane) {
    // Transpose the lane's 8 x 8 bits: byte p holds plane p, bit i of it column i
    unsigned swap = (low ^ (low >> 7)) & 0x00AA00AAu;
    low ^= swap ^ (swap << 7);
    swap = (high ^ (high >> 7)) & 0x00AA00AAu;
    high ^= swap ^ (swap << 7);
    swap = (low ^ (low >> 14)) & 0x0000CCCCu;
    low ^= swap ^ (swap << 14);
    swap = (high ^ (high >> 14)) & 0x0000CCCCu;
    high ^= swap ^ (swap << 14);
    unsigned planes_0_3 = (low & 0x0F0F0F0Fu) | ((high & 0x0F0F0F0Fu) << 4);
    unsigned planes_4_7 = (high & 0xF0F0F0F0u) | ((low >> 4) & 0x0F0F0F0Fu);
    // Transpose 8 x 8 bytes across the eight lanes with the same t: exchange words, then halves, then bytes
    bool upper = lane & 16;
    unsigned received = __shfl_xor_sync(~0u, upper ? planes_0_3 : planes_4_7, 16);
    low = upper ? received : planes_0_3;
    high = upper ? planes_4_7 : received;
    upper = lane & 8;
    received = __shfl_xor_sync(~0u, __byte_perm(low, high, upper ? 0x5410 : 0x7632), 8);
    low = __byte_perm(low, received, upper ? 0x3254 : 0x5410);
    high = __byte_perm(high, received, upper ? 0x3276 : 0x7610);
    upper = lane & 4;
    received = __shfl_xor_sync(~0u, __byte_perm(low, high, upper ? 0x6420 : 0x7531), 4);
    low = __byte_perm(low, received, upper ? 0x3514 : 0x5240);
    high = __byte_perm(high, received, upper ? 0x3716 : 0x7260);
    return make_uint2(low, high);
}

// Where padded groups put the columns: group g of `size` columns starts at g * padded. -1: padding.
template <int size, int padded> __device__ inline int source_column(int column, int columns) {
    if constexpr (size != padded) {
        int group = column / padded, offset = column % padded;
        column = offset < size ? group * size + offset : columns;
    }
    return column < columns ? column : -1;
}
