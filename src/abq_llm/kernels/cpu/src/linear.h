// A quantized linear layer on tokens in fp32: quantize, multiply, add the bias, on several threads.
#pragma once

#include "level.h"

namespace abq {

// x [count, columns of the weight] -> y [count, rows]. `bias` [rows] may be null.
void linear(const Level& level, const float* x, int64_t count, const Weight& weight, const float* bias, Format format,
            float* y, int threads);

}  // namespace abq
