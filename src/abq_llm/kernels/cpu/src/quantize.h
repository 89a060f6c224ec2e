// The quantizer of activations, in plain loops that the compiler makes vectors of, once for each level.
//
// The arithmetic is the contract of quantizers.py: the same fp32 operations in the same order. A token that holds NaN or
// infinity gets the scale NaN, and so gives NaN everywhere.
#pragma once

#include <cstring>
#include <limits>

#include "tokens.h"

namespace abq {
namespace {  // every level compiles its own copy

constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

// To the nearest integer, ties to even, for |x| <= 2^22: what is beyond the point falls off the end of the sum.
inline float round_even(float x) { return (x + 0x1.8p23f) - 0x1.8p23f; }

inline float larger(float a, float b) { return a > b ? a : b; }
inline float smaller(float a, float b) { return a < b ? a : b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t group_columns(const Columns& columns, int64_t g) {
    return smaller(columns.group, columns.count - g * columns.group);
}

struct Range {
    float low, high;  // zero included
    bool finite;
};

Range range_of(const float* x, int64_t count) {
    float low = 0, high = 0;
    int strange = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : strange)
    for (int64_t i = 0; i < count; ++i) {
        low = smaller(low, x[i]);
        high = larger(high, x[i]);
        strange |= !(x[i] - x[i] == 0);
    }
    return {low, high, strange == 0};
}

struct Grid {
    float scale, reciprocal, zero;
};

Grid grid_of(const Range& range, int bits, bool symmetric) {
    const float max_code = float((1 << bits) - 1);
    Grid grid{0, 0, float(1 << (bits - 1))};
    if (!range.finite) return {NOT_A_NUMBER, 0, 0};
    if (symmetric)
        grid.scale = larger(range.high, -range.low) / larger(max_code - grid.zero, 1);
    else
        grid.scale = (range.high - range.low) / max_code;
    grid.scale = larger(grid.scale, MIN_SCALE);
    grid.reciprocal = 1 / grid.scale;
    if (!symmetric) grid.zero = smaller(round_even(-range.low * grid.reciprocal), max_code);
    return grid;
}

// Where the blocks of one token go, among those of the strip's other tokens.
class Places {
   public:
    Places(const Tokens& tokens, int64_t strip, int lane)
        : row_(tokens.codes + strip * tokens.codes_per_strip + (tokens.by_rows ? ROW : STEP) * lane),
          by_rows_(tokens.by_rows), digit_((by_rows_ ? ROW : STEP) * tokens.width), all_(digit_ * tokens.digits) {}

    // The codes of digit d.
    void put(const int8_t* codes, int d) const {
        int8_t* at = row_ + d * digit_;
        if (by_rows_)
            std::memcpy(at + BLOCK * second_, codes, BLOCK);
        else
            for (int step = 0; step < STEPS; ++step) std::memcpy(at + step * all_, codes + STEP * step, STEP);
    }
    void next() {
        if (!by_rows_) row_ += STEPS * all_;
        if (by_rows_ && second_) row_ += all_;
        second_ = !second_;
    }
    void end_group(int digits) {
        if (!by_rows_) return;
        const int8_t zeros[BLOCK] = {};
        if (second_) {
            for (int d = 0; d < digits; ++d) put(zeros, d);
            next();
        }
    }

   private:
    int8_t* row_;
    const bool by_rows_;
    const int64_t digit_, all_;
    bool second_ = false;
};

void quantize_short(const float* x, const Tokens& tokens, int64_t strip, int lane) {
    const Format format = tokens.format;
    const Range range = range_of(x, tokens.columns.count);
    const float max_code = float(tokens.max_code), offset = float(tokens.offset);
    const Grid grid = grid_of(range, format.bits, format.symmetric);
    tokens.scale[strip * tokens.width + lane] = grid.scale;
    tokens.zero[strip * tokens.width + lane] = int32_t(grid.zero - offset);

    Places places(tokens, strip, lane);
    int32_t* sums = tokens.sums + strip * tokens.segments * tokens.width + lane;
    for (int64_t g = 0; g < tokens.columns.groups; ++g, sums += tokens.width) {
        const float* end = x + group_columns(tokens.columns, g);
        for (*sums = 0; x < end; x += BLOCK, places.next()) {
            const int filled = int(smaller(end - x, BLOCK));
            float block[BLOCK] = {};
            std::memcpy(block, x, sizeof(float) * filled);
            alignas(BLOCK) int8_t codes[BLOCK];
            for (int i = 0; i < BLOCK; ++i) {
                const float code = smaller(larger(round_even(block[i] * grid.reciprocal) + grid.zero, 0), max_code);
                codes[i] = int8_t(int32_t(code - offset));
            }
            for (int i = filled; i < BLOCK; ++i) codes[i] = 0;
            int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int i = 0; i < BLOCK; ++i) sum += codes[i];
            *sums += sum;
            places.put(codes, 0);
        }
        places.end_group(1);
        x = end;
    }
}

void quantize_long(const float* x, const Tokens& tokens, int64_t strip, int lane) {
    Places places(tokens, strip, lane);
    float* scale = tokens.scale + strip * tokens.segments * tokens.width + lane;
    int32_t* sums = tokens.sums + strip * tokens.segments * 3 * tokens.width + lane;
    for (int64_t g = 0; g < tokens.columns.groups; ++g) {
        const float* group_end = x + group_columns(tokens.columns, g);
        for (; x < group_end; scale += tokens.width, sums += 3 * tokens.width) {
            const float* end = x + smaller(group_end - x, SEGMENT_BLOCKS * BLOCK);
            const Range range = range_of(x, end - x);
            *scale = larger(range.high, -range.low) / LARGEST_A16;
            const float reciprocal = *scale > 0 && range.finite ? 1 / *scale : 0;
            if (!range.finite) *scale = NOT_A_NUMBER;
            int32_t sum[3] = {};
            for (; x < end; x += BLOCK, places.next()) {
                float block[BLOCK] = {};
                std::memcpy(block, x, sizeof(float) * smaller(end - x, BLOCK));
                alignas(BLOCK) int8_t codes[3][BLOCK];
                int32_t high = 0, middle = 0, low = 0;
#pragma omp simd reduction(+ : high, middle, low)
                for (int i = 0; i < BLOCK; ++i) {
                    const int32_t code = int32_t(round_even(block[i] * reciprocal));
                    const int32_t l = int8_t(code), rest = (code - l) >> 8, m = int8_t(rest), h = (rest - m) >> 8;
                    codes[0][i] = int8_t(h), codes[1][i] = int8_t(m), codes[2][i] = int8_t(l);
                    high += h, middle += m, low += l;
                }
                sum[0] += high, sum[1] += middle, sum[2] += low;
                for (int d = 0; d < 3; ++d) places.put(codes[d], d);
            }
            for (int d = 0; d < 3; ++d) sums[d * tokens.width] = sum[d];
            x = end;
        }
        places.end_group(3);
    }
}

// One token, fp32 [columns].
void quantize(const float* x, const Tokens& tokens, int64_t token) {
    const int64_t strip = token / tokens.width;
    const int lane = int(token % tokens.width);
    tokens.digits == 1 ? quantize_short(x, tokens, strip, lane) : quantize_long(x, tokens, strip, lane);
}

}  // namespace
}  // namespace abq
