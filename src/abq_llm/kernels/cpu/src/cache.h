// Keys and values of one head: what attention has seen so far.
//
//     keys     [position / 16][dimension][16]       lanes are positions: a score needs no sum over a vector
//     values   [position][dimension]                lanes are dimensions
//
// 16 bits: fp16. Up to 8 bits: codes by the contract of quantizers.py, a scale and zero point for each position; up to
// 4 bits two codes a byte, dimension d low and d + dimension / 2 high.
#pragma once

#include "layout.h"

namespace abq {

struct Head {
    int64_t dimension;  // a multiple of 2 * TILE where codes have up to 4 bits, else of TILE
    int bits;
    bool symmetric;
    uint8_t *keys, *values;
    float *key_scale, *value_scale;   // [position]
    uint8_t *key_zero, *value_zero;
};

}  // namespace abq
