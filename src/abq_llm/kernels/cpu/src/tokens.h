// Activations as the kernels read them: integer codes, what turns them back into numbers, and their sums.
//
// Tokens come in strips of `width`, which one pass over the weight multiplies together:
//
//     codes   int8 [strip][step][digit][width][4]     padded columns hold 0
//
// Up to 8 bits there is one digit: code - offset, the offset being 128 at 8 bits (a signed byte holds it) and else 0.
// The zero points are shifted alike, so nothing else has to know. At A16 a token is cut into segments of at most 128
// columns of one group, whose codes of 24 bits are three signed digits, high to low: x ~ (65536 h + 256 m + l) * scale.
// Up to 8 bits a segment is a whole group.
//
// Strips of more than 16 tokens are for multipliers of whole matrices (amx.cpp), which want a token's codes in one row:
//
//     codes   int8 [strip][row][digit][width][64]    a row is two blocks of a group, or its last and zeros
#pragma once

#include "layout.h"

namespace abq {

constexpr int64_t SEGMENT_BLOCKS = 4;   // at A16
constexpr int ROW = 2 * BLOCK;          // columns
constexpr int MOST_TOKENS_BY_STEPS = 16;
constexpr float MIN_SCALE = 0x1p-20f;   // as in quantizers.py
constexpr float LARGEST_A16 = 4194303;  // 2^22 - 1: what `round_even` rounds, and three digits hold

struct Format {
    int bits;  // 1..8 or 16
    bool symmetric;
};

class Buffer;

struct Tokens {
    Format format;
    Columns columns;
    int64_t count;
    int digits, width;
    bool by_rows;
    int32_t max_code, offset;
    int64_t strips, segment_blocks, segments, codes_per_strip;
    int8_t* codes;
    float* scale;   // [strip][width]; at A16 [strip][segment][width]
    int32_t* zero;  // [strip][width]
    int32_t* sums;  // [strip][segment][digit][width], of the codes

    // The tables are in `memory`, of which the tokens before lose theirs.
    Tokens(Format format, const Columns& columns, int64_t count, int width, Buffer& memory);
};

}  // namespace abq
