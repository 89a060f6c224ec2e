#pragma once

#include "layout.h"

namespace abq {

// A packed weight as on disk (docs/checkpoint-format.md).
struct Packed {
    const uint32_t* planes;  // [planes][rows][ceil(columns / 32)]
    const void* scale;       // [rows][groups], fp16 if the weight is narrow, else fp32
    const uint8_t* zero;     // [rows][groups], or null: `fixed_zero` everywhere
    int32_t fixed_zero;
};

// Writes the header and all that follows it: `header.bytes` bytes. `out` is aligned to 64 bytes.
void prepare(const Weight& header, const Packed& packed, void* out, int threads);

}  // namespace abq
