// Bit-planes to bytes, in registers: the weights as operand A of the int8 tensor-core instructions.
//
// A word of WEIGHTS holds one plane: bit i + 8j is column j of step i (32 columns) of a block of 256. The operand of step i
// wants, in byte j, the bits of all planes. That is a transposition of "step" and "plane" inside every byte,
//
//     word[plane] bit step   ->   word[step] bit plane          (8 planes x 8 steps, 4 bytes at a time)
//
// done like every transposition of a power of two: exchange one bit of the two indices at a time, two instructions (a shift and
// a LOP3) per word. With fewer than 8 planes it stops early: a word then holds 8 / planes steps, one mask apart. With 8, the
// last exchange is left for when a step is wanted: a product still under way keeps its operand, not the words, from being
// overwritten (see `wgmma_wait`).
//
//     instructions per 4 weights      1 plane 1.9   2 planes 2.3   4 planes 3.5   8 planes 6
//     one plane after the other       1 plane 1.9   2 planes 3.8   4 planes 7.5   8 planes 15
#pragma once

#include "common.cuh"

__device__ constexpr int power_of_two_above(int planes) { return planes <= 1 ? 1 : planes <= 2 ? 2 : planes <= 4 ? 4 : 8; }

// The bits of `first` where `mask` has ones, else those of `second`: one LOP3, which the compiler does not find by itself
__device__ inline unsigned select_bits(unsigned mask, unsigned first, unsigned second) {
    unsigned result;
    asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(result) : "r"(first), "r"(second), "r"(mask));
    return result;
}

// Bit `distance` of the index of the word against the same bit of the place in the byte; words from `planes` on are zeros
template <int distance, int planes, int words> __device__ inline void exchange_index_bit(unsigned (&word)[words]) {
    constexpr unsigned low = distance == 1 ? 0x55555555u : distance == 2 ? 0x33333333u : 0x0F0F0F0Fu;
    constexpr int used = ceil_div(planes, distance) * distance;
#pragma unroll
    for (int index = 0; index < used; index++) {
        if (index & distance) continue;
        unsigned first = word[index], second = word[index + distance];
        if (index + distance < used) {
            word[index] = select_bits(low, first, second << distance);
            word[index + distance] = select_bits(low, first >> distance, second);
        } else {
            word[index] = first & low;
            word[index + distance] = (first >> distance) & low;
        }
    }
}

// word[plane] of one register of the fragment, planes filled up with zeros to `words` = 1, 2, 4 or 8
template <int planes, int words> __device__ inline void planes_to_steps(unsigned (&word)[words]) {
    if constexpr (words >= 2) exchange_index_bit<1, planes>(word);
    if constexpr (words >= 4) exchange_index_bit<2, planes>(word);
}

// What a lane has of a k-block of a row tile, word[register of the fragment][]; plane p begins 32 p behind `from`
template <int planes, int words> __device__ inline void load_planes(unsigned (&word)[4][words], const uint4* from) {
#pragma unroll
    for (int p = 0; p < words; p++) {
        const uint4 plane = p < planes ? from[p * 32] : make_uint4(0, 0, 0, 0);
        word[0][p] = plane.x, word[1][p] = plane.y, word[2][p] = plane.z, word[3][p] = plane.w;
    }
#pragma unroll
    for (int i = 0; i < 4; i++) planes_to_steps<planes>(word[i]);
}

// The four codes of `step` (0..7), one a byte
template <int words> __device__ inline unsigned codes_of_step(const unsigned (&word)[words], int step) {
    if constexpr (words == 8) {
        const unsigned first = word[step % 4], second = word[step % 4 + 4];
        return step < 4 ? select_bits(0x0F0F0F0Fu, first, second << 4) : select_bits(0x0F0F0F0Fu, first >> 4, second);
    } else {
        constexpr unsigned field = 0x01010101u * ((1u << words) - 1);
        return (word[step % words] >> (step - step % words)) & field;
    }
}
