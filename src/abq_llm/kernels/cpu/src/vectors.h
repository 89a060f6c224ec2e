// Vectors of VECTOR_BYTES bytes, in the notation that GCC and Clang share. A vector is LANES rows of a tile.
#pragma once

#include <cstring>

#include "layout.h"

namespace abq {
namespace {  // every level compiles its own copy

constexpr int LANES = VECTOR_BYTES / 4;
constexpr int PARTS = TILE / LANES;  // vectors of a tile

typedef uint16_t Bytes __attribute__((vector_size(VECTOR_BYTES)));  // a row's step in four bytes; 16 bits for the shifts
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint8_t Octets __attribute__((vector_size(VECTOR_BYTES / 4)));

template <class T>
inline T load(const void* from) {
    T vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

#define UNROLL _Pragma("GCC unroll 32")  // or else arrays of vectors would not stay in registers

// Each byte shifted right by SHIFT (left if negative), then masked: the mask removes what came from its neighbour.
template <int SHIFT, int MASK>
inline Bytes field(Bytes bytes) {
    if constexpr (SHIFT > 0) bytes >>= SHIFT;
    if constexpr (SHIFT < 0) bytes <<= -SHIFT;
    return bytes & uint16_t(MASK | MASK << 8);
}

}  // namespace
}  // namespace abq
