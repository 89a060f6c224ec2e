// One instruction set: how it quantizes a token, and multiplies a strip of tokens by a tile of the weight.
#pragma once

#include "cache.h"
#include "tokens.h"

namespace abq {

// out [width][TILE], fp32: everything but the bias. Rows past the end hold anything.
using Product = void (*)(const Weight& weight, const Tokens& tokens, int64_t tile, int64_t strip, float* out);

struct Level {
    const char* name;
    bool (*supported)();
    int (*width)(int64_t tokens, int digits);  // of a strip, at most MOST_WIDTH
    void (*quantize)(const float* x, const Tokens& tokens, int64_t token);
    Product (*product)(int planes, int digits, int width);
    // What a decoder computes besides: attention.h says what.
    void (*norm)(const float* x, const float* weight, float epsilon, int64_t count, float* out);
    void (*swiglu)(float* gate, const float* up, int64_t count);
    void (*dense)(const uint16_t* rows, int64_t count, int64_t columns, const float* x, float* y);
    void (*append)(const Head& head, int64_t position, const float* key, const float* value);
    void (*attend)(const Head& head, int64_t length, const float* queries, int count, float scaling, float* scores,
                   float* out);
};

constexpr int MOST_WIDTH = 64;

extern const Level amx, avx512, avx2, neon, scalar;

// Those of this build, the fastest first; the last is `scalar`.
extern const Level* const levels[];
extern const int level_count;

// The level of that name, or `scalar`.
const Level& level_named(const char* name);

}  // namespace abq
