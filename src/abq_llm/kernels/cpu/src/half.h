#pragma once

#include <cstdint>
#include <cstring>

namespace abq {

// IEEE fp16 -> fp32, exact.
inline float float_of_half(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16, rest = uint32_t(half & 0x7fff) << 13;
    uint32_t bits = rest + (112u << 23);                 // exponent: bias 15 -> 127
    if (rest >= 0x7c00u << 13) bits += 112u << 23;       // infinity, NaN
    float value;
    if (rest < 0x0400u << 13) {                          // subnormal: an integer times 2^-24
        value = float(half & 0x7fff) * 0x1p-24f;
        std::memcpy(&bits, &value, sizeof bits);
    }
    bits |= sign;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace abq
