// From sums of products of codes to outputs: corrections for zero points, scales, bias, and the store.
//
// With x = s_x (q_x - z_x) and w = s_w (q_w - z_w), sums over the columns k:
//     per channel   y = s_w s_x (sum q_w q_x - z_w sum q_x - z_x sum (q_w - z_w))              the bracket is an exact integer
//     grouped       y = s_x (sum_g s_w,g (sum q_w q_x - z_w,g sum q_x) - z_x offset)           offset = sum_g s_w,g sum (q_w - z_w,g)
#pragma once

#include "common.cuh"

// Integers wrap around: only the result has to fit. Roundings are one by one, as in the reference: no fused multiply-add.
__device__ inline float output_per_channel(
    int products, int w_zero, int w_centered_sum, float w_scale, int x_zero, int x_sum, float x_scale) {
    unsigned value = unsigned(products) - unsigned(w_zero) * unsigned(x_sum) - unsigned(x_zero) * unsigned(w_centered_sum);
    return __fmul_rn(__fmul_rn(float(int(value)), w_scale), x_scale);
}

__device__ inline float output_grouped(float sum, float w_offset, int x_zero, float x_scale) {
    return __fmul_rn(__fadd_rn(sum, -__fmul_rn(float(x_zero), w_offset)), x_scale);
}

// The first `count` of 8 neighbours of a row of the output, 16 bytes at a time where the address allows
template <class T> __device__ inline void store_8(T* address, const float (&values)[8], int count) {
    if (count >= 8 && (unsigned long long)(address) % 16 == 0) {
        union {
            T element[8];
            uint4 vector[sizeof(T) / 2];
        } packed;
#pragma unroll
        for (int i = 0; i < 8; i++) packed.element[i] = from_float<T>(values[i]);
#pragma unroll
        for (int i = 0; i < int(sizeof(T) / 2); i++) reinterpret_cast<uint4*>(address)[i] = packed.vector[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) address[i] = from_float<T>(values[i]);
    }
}
