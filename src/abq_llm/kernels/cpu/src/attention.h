// Attention of a few query heads over one head of keys and values, and what else a decoder block computes, in fp32.
#pragma once

#include "cache.h"
#include "quantize.h"
#include "vectors.h"

namespace abq {
namespace {  // every level compiles its own copy

// e^x within 2 units in the last place; 0 far below, never infinite. Cephes' polynomial on [-ln 2 / 2, ln 2 / 2].
inline Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Floats n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    Floats p = x * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * x * x + x + 1.0f;
    return (Floats)((Ints)p + (__builtin_convertvector(n, Ints) << 23));
}

inline float sum_of(Floats lanes) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

// x / rms(x) * weight
void norm(const float* x, const float* weight, float epsilon, int64_t count, float* out) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < count; ++i) squares += x[i] * x[i];
    const float factor = 1 / __builtin_sqrtf(squares / float(count) + epsilon);
    for (int64_t i = 0; i < count; ++i) out[i] = weight[i] * (x[i] * factor);
}

// gate <- silu(gate) * up; count is a multiple of TILE.
void swiglu(float* gate, const float* up, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats x = load<Floats>(gate + i);
        const Floats y = x / (1.0f + exponential(-x)) * load<Floats>(up + i);
        std::memcpy(gate + i, &y, sizeof y);
    }
}

// y = fp16 rows [count][columns] times x; columns is a multiple of TILE.
template <class V>
void dense(const uint16_t* rows, int64_t count, int64_t columns, const float* x, float* y) {
    for (int64_t n = 0; n < count; ++n, rows += columns) {
        Floats sums[4] = {};
        int64_t k = 0;
        for (; k + 4 * LANES <= columns; k += 4 * LANES)
            for (int i = 0; i < 4; ++i) {
                const int64_t at = k + LANES * i;
                sums[i] = V::multiply_add(V::halves(rows + at), load<Floats>(x + at), sums[i]);
            }
        for (; k < columns; k += LANES) sums[0] = V::multiply_add(V::halves(rows + k), load<Floats>(x + k), sums[0]);
        y[n] = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// Codes of one key or value; returns its scale and zero point.
Grid quantize_vector(const float* x, const Head& head, uint8_t* codes) {
    const float max_code = float((1 << head.bits) - 1);
    const Grid grid = grid_of(range_of(x, head.dimension), head.bits, head.symmetric);
    for (int64_t i = 0; i < head.dimension; ++i)
        codes[i] = uint8_t(smaller(larger(round_even(x[i] * grid.reciprocal) + grid.zero, 0), max_code));
    return grid;
}

constexpr int64_t MOST_DIMENSIONS = 512;

template <class V>
void append(const Head& head, int64_t position, const float* key, const float* value) {
    const int64_t d = head.dimension, block = position / TILE, lane = position % TILE;
    if (head.bits == 16) {
        uint16_t* keys = reinterpret_cast<uint16_t*>(head.keys) + block * d * TILE + lane;
        uint16_t* values = reinterpret_cast<uint16_t*>(head.values) + position * d;
        uint16_t halves[MOST_DIMENSIONS];
        for (int64_t i = 0; i < d; i += LANES) V::to_halves(load<Floats>(key + i), halves + i);
        for (int64_t i = 0; i < d; ++i) keys[i * TILE] = halves[i];
        for (int64_t i = 0; i < d; i += LANES) V::to_halves(load<Floats>(value + i), values + i);
        return;
    }
    const int64_t stored = head.bits > 4 ? d : d / 2;
    uint8_t codes[MOST_DIMENSIONS];
    auto stored_code = [&](int64_t i) { return uint8_t(stored == d ? codes[i] : codes[i] | codes[i + stored] << 4); };
    Grid grid = quantize_vector(key, head, codes);
    head.key_scale[position] = grid.scale, head.key_zero[position] = uint8_t(grid.zero);
    for (int64_t i = 0; i < stored; ++i) head.keys[(block * stored + i) * TILE + lane] = stored_code(i);
    grid = quantize_vector(value, head, codes);
    head.value_scale[position] = grid.scale, head.value_zero[position] = uint8_t(grid.zero);
    for (int64_t i = 0; i < stored; ++i) head.values[position * stored + i] = stored_code(i);
}

inline Floats to_floats(Octets codes) {
    return __builtin_convertvector(__builtin_convertvector(codes, Ints), Floats);
}

// LANES numbers or codes at element `index` of a table: BITS is 16, 8, or 4 (of 4, the low or the high halves).
template <class V, int BITS, bool HIGH = false>
inline Floats elements(const uint8_t* table, int64_t index) {
    if constexpr (BITS == 16) return V::halves(reinterpret_cast<const uint16_t*>(table) + index);
    const Octets bytes = load<Octets>(table + index);
    if constexpr (BITS == 8) return to_floats(bytes);
    return to_floats(HIGH ? bytes >> 4 : bytes & 15);
}

// Vectors of positions or dimensions that are summed side by side, so that no addition waits for the last.
constexpr int SIDE_BY_SIDE = VECTOR_BYTES == 32 ? 2 : 4;  // AVX2 has few registers

// scores[q][position] = scaling * query . key, for B vectors of positions; sums: of each query
template <class V, int BITS, int Q, int B>
void score_some(const Head& head, int64_t position, const float* queries, const float* sums, float scaling,
                float* scores, int64_t stride) {
    const int64_t d = head.dimension, stored = BITS == 4 ? d / 2 : d;
    int64_t first[B];
    for (int b = 0; b < B; ++b) {
        const int64_t at = position + LANES * b;
        first[b] = at / TILE * stored * TILE + at % TILE;
    }
    Floats s[Q][B] = {};
    for (int64_t i = 0; i < stored; ++i)
        UNROLL for (int b = 0; b < B; ++b) {
            const Floats low = elements<V, BITS>(head.keys, first[b] + i * TILE);
            UNROLL for (int q = 0; q < Q; ++q) s[q][b] = V::multiply_add(Floats{} + queries[q * d + i], low, s[q][b]);
            if constexpr (BITS == 4) {
                const Floats high = elements<V, BITS, true>(head.keys, first[b] + i * TILE);
                UNROLL for (int q = 0; q < Q; ++q)
                    s[q][b] = V::multiply_add(Floats{} + queries[q * d + stored + i], high, s[q][b]);
            }
        }
    UNROLL for (int b = 0; b < B; ++b) {
        const int64_t at = position + LANES * b;
        UNROLL for (int q = 0; q < Q; ++q) {
            Floats score = s[q][b];
            if constexpr (BITS != 16)  // zero points are taken off at the end
                score = (score - sums[q] * to_floats(load<Octets>(head.key_zero + at))) *
                        load<Floats>(head.key_scale + at);
            score *= scaling;
            std::memcpy(scores + q * stride + at, &score, sizeof score);
        }
    }
}

template <class V, int BITS, int Q>
void score(const Head& head, int64_t length, const float* queries, float scaling, float* scores, int64_t stride) {
    float sums[Q] = {};
    if constexpr (BITS != 16)
        for (int q = 0; q < Q; ++q)
            for (int64_t i = 0; i < head.dimension; ++i) sums[q] += queries[q * head.dimension + i];
    constexpr int B = SIDE_BY_SIDE;
    int64_t position = 0;
    for (; position + B * LANES <= stride; position += B * LANES)
        score_some<V, BITS, Q, B>(head, position, queries, sums, scaling, scores, stride);
    for (; position < length; position += LANES)
        score_some<V, BITS, Q, 1>(head, position, queries, sums, scaling, scores, stride);
}

// scores -> e^(score - largest), next to 0 past the end up to a whole vector; returns their sum.
float soften(float* scores, int64_t length) {
    for (int64_t i = length; i % LANES != 0; ++i) scores[i] = -std::numeric_limits<float>::max();
    Floats most = load<Floats>(scores), sums{};
    for (int64_t i = LANES; i < length; i += LANES) {
        const Floats now = load<Floats>(scores + i);
        most = now > most ? now : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; ++i) largest = larger(largest, most[i]);
    for (int64_t i = 0; i < length; i += LANES) {
        const Floats e = exponential(load<Floats>(scores + i) - largest);
        std::memcpy(scores + i, &e, sizeof e);
        sums += e;
    }
    return sum_of(sums);
}

// out[q] = sum over positions of weights[q][position] * value, for D vectors of dimensions from `from` on.
template <class V, int BITS, int Q, int D>
void mix(const Head& head, int64_t length, const float* weights, int64_t stride, int64_t from, float* out) {
    const int64_t d = head.dimension, stored = BITS == 4 ? d / 2 : d;
    Floats low[Q][D] = {}, high[Q][D] = {};
    float zeros[Q] = {};
    for (int64_t position = 0; position < length; ++position) {
        float factor[Q];
        UNROLL for (int q = 0; q < Q; ++q) {
            factor[q] = weights[q * stride + position];
            if constexpr (BITS != 16) {
                factor[q] *= head.value_scale[position];
                zeros[q] += factor[q] * float(head.value_zero[position]);
            }
        }
        UNROLL for (int v = 0; v < D; ++v) {
            const int64_t at = position * stored + from + LANES * v;
            const Floats value = elements<V, BITS>(head.values, at);
            UNROLL for (int q = 0; q < Q; ++q) low[q][v] = V::multiply_add(Floats{} + factor[q], value, low[q][v]);
            if constexpr (BITS == 4) {
                const Floats other = elements<V, BITS, true>(head.values, at);
                UNROLL for (int q = 0; q < Q; ++q)
                    high[q][v] = V::multiply_add(Floats{} + factor[q], other, high[q][v]);
            }
        }
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < D; ++v) {
            const Floats a = low[q][v] - zeros[q], b = high[q][v] - zeros[q];
            std::memcpy(out + q * d + from + LANES * v, &a, sizeof a);
            if constexpr (BITS == 4) std::memcpy(out + q * d + stored + from + LANES * v, &b, sizeof b);
        }
}

template <class V, int BITS, int Q>
void attend_heads(const Head& head, int64_t length, const float* queries, float scaling, float* scores, float* out) {
    const int64_t d = head.dimension, stored = BITS == 4 ? d / 2 : d;
    const int64_t stride = (length + TILE - 1) / TILE * TILE;
    score<V, BITS, Q>(head, length, queries, scaling, scores, stride);
    float sums[Q];
    for (int q = 0; q < Q; ++q) sums[q] = soften(scores + q * stride, length);
    int64_t from = 0;
    constexpr int D = BITS == 4 ? SIDE_BY_SIDE / 2 : SIDE_BY_SIDE;
    for (; from + D * LANES <= stored; from += D * LANES) mix<V, BITS, Q, D>(head, length, scores, stride, from, out);
    for (; from < stored; from += LANES) mix<V, BITS, Q, 1>(head, length, scores, stride, from, out);
    for (int q = 0; q < Q; ++q)
        for (int64_t i = 0; i < d; ++i) out[q * d + i] /= sums[q];
}

template <class V, int BITS>
void attend_group(const Head& head, int64_t length, const float* queries, int count, float scaling, float* scores,
                  float* out) {
    for (const int64_t d = head.dimension; count > 0;) {
        const int now = count < 4 ? count : 4;
        const auto attend = now == 4   ? attend_heads<V, BITS, 4>
                            : now == 3 ? attend_heads<V, BITS, 3>
                            : now == 2 ? attend_heads<V, BITS, 2>
                                       : attend_heads<V, BITS, 1>;
        attend(head, length, queries, scaling, scores, out);
        queries += now * d, out += now * d, count -= now;
    }
}

// queries, out [count][dimension]: the heads that share these keys and values, which hold `length` positions.
// scores: room for 4 numbers a position, and 4 * TILE more.
template <class V>
void attend(const Head& head, int64_t length, const float* queries, int count, float scaling, float* scores,
            float* out) {
    const auto attend = head.bits == 16 ? attend_group<V, 16> : head.bits > 4 ? attend_group<V, 8> : attend_group<V, 4>;
    attend(head, length, queries, count, scaling, scores, out);
}

}  // namespace
}  // namespace abq
