// Quantized linear layers on tokens in fp32: quantize, multiply, add the bias, on several threads.
#pragma once

#include <vector>

#include "buffer.h"
#include "level.h"

namespace abq {

struct Linear {
    const Weight* weight;
    const float* bias;  // [rows], or null
    float* y;           // [tokens][rows]
};

// `level`, or `scalar` where its integers would not do.
const Level& able(const Level& level, const Weight& weight, Format format);

// x [count][columns] -> tokens, whose tables are in `memory`.
Tokens quantize(const Level& level, const float* x, int64_t count, const Columns& columns, Format format,
                Buffer& memory, int threads);

// All of `layers` on the same tokens; their columns are those of the tokens, their planes alike.
void multiply(const Level& level, const Tokens& tokens, const std::vector<Linear>& layers, int threads);

// Both, for layers of the same input x.
void linear(const Level& level, const float* x, int64_t count, Format format, const std::vector<Linear>& layers,
            int threads);

}  // namespace abq
