#pragma once

#include <cstdint>
#include <cstring>

namespace abq {

// IEEE fp16 -> fp32, exact.
static inline float float_of_half(uint16_t half) {
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

// fp32 -> the nearest fp16, ties to even.
static inline uint16_t half_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
    if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to 2^16 or more: infinity
    if (bits < 0x38800000) {                       // below 2^-14: an integer times 2^-24
        std::memcpy(&value, &bits, sizeof value);
        const float shifted = value * 0x1p24f;
        return sign | uint16_t(int((shifted + 0x1.8p23f) - 0x1.8p23f));
    }
    bits -= 112u << 23;
    return sign | uint16_t((bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace abq
