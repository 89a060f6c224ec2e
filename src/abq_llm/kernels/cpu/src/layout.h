// The weight as the kernels read it, made once from the bit-planes on disk: one piece of memory, this header first.
//
// Rows come in tiles of 16, columns in blocks of 32; each group of columns starts a block. A step is four neighbouring
// columns: one integer instruction multiplies a step of 16 rows, four products a 32-bit lane.
//
//     codes   [tile][block][64 * planes bytes]
//             A block is cut into pieces of 8, 4, 2 and 1 planes (3 planes: 2 + 1, the lowest planes first). The piece
//             that starts at plane b starts at byte 64 b. A piece of c planes is c vectors of 64 bytes, and a vector is
//             8 / c steps: bits c f .. c f + c - 1 of byte 4 r + j of vector v are those planes of
//             row r, column 4 (8 / c * v + f) + j of the block.
//
//                 c = 2:   byte 4 r + j   [ step 4 v + 3 | step 4 v + 2 | step 4 v + 1 | step 4 v ]   (high bits left)
//
//             So the codes of a step are a shift and a mask away, with no bit ever crossing a byte.
//     scale   [tile][group][16]   fp32; fp16 in a narrow weight
//     total   [tile][group][16]   int32, sum over the group of (code - zero point); int16 in a narrow weight
//     zero    [tile][group][16]   uint8
//
// Rows and columns past the end have code 0 and scale 0.
#pragma once

#include <cstddef>
#include <cstdint>

namespace abq {

constexpr int TILE = 16;   // rows
constexpr int BLOCK = 32;  // columns
constexpr int STEP = 4;    // columns
constexpr int STEPS = BLOCK / STEP;
constexpr int VECTOR = TILE * STEP;  // bytes of a step of codes, a byte each

// The structs below are data only, filled in by functions that no level compiles: an inline function of a header would
// be merged with the copy that AVX-512 code has of it.

// How the columns of a weight, and of the tokens that meet it, are cut.
struct Columns {
    int64_t count;
    int64_t group;  // columns of a group; the last may be short
    int64_t groups;
    int64_t group_blocks, last_blocks;  // blocks of a group, and of the last
    int64_t blocks;                     // of all
};

struct Weight {
    Columns columns;
    int64_t rows, tiles;
    int64_t codes_at, scale_at, total_at, zero_at, bytes;  // from the start of this header
    int32_t planes, max_code;
    int32_t narrow;  // whether scale and total take 16 bits
};

Weight describe(int64_t rows, int64_t columns, int64_t group, int planes, int max_code, bool narrow);

static inline int64_t align(int64_t bytes) { return (bytes + 63) / 64 * 64; }

template <class T>
static inline const T* table_of(const Weight& weight, int64_t table_at, int64_t tile) {
    return reinterpret_cast<const T*>(reinterpret_cast<const uint8_t*>(&weight) + table_at) +
           tile * weight.columns.groups * TILE;
}

static inline const uint8_t* codes_of(const Weight& weight, int64_t tile) {
    return reinterpret_cast<const uint8_t*>(&weight) + weight.codes_at +
           tile * weight.columns.blocks * VECTOR * weight.planes;
}

}  // namespace abq
