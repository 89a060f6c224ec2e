// The product of a strip of tokens and a tile of the weight, in the vectors of `vectors.h`.
//
// What is computed is in `scalar.cpp`, in plain loops. A level V adds
//     dot<P>(sums, codes, x)   sums[row] += codes[row][0 .. 3] * x[0 .. 3], for codes of P bits
//     CODE_OFFSET<P>           what `dot` takes off each code
//     multiply_add(a, b, c)    a * b + c for attention.h, rounded once where the CPU can
//     halves(from)             LANES fp16 numbers as Floats; to_halves(floats, to) is the way back
//     MOST_TOKENS(_A16)        of a strip: what the registers hold
#pragma once

#include <utility>

#include "level.h"
#include "vectors.h"

namespace abq {
namespace {  // every level compiles its own copy

// The codes of step S of part of a block of P planes: layout.h, backwards.
template <int P, int S>
inline Bytes step_codes(const uint8_t* block) {
    if constexpr (P == 8) return load<Bytes>(block + VECTOR * S);
    Bytes codes{};
    if constexpr ((P & 4) != 0) codes = field<4 * (S % 2), 15>(load<Bytes>(block + VECTOR * (S / 2)));
    if constexpr ((P & 2) != 0) {
        constexpr int base = P & 4;
        codes |= field<2 * (S % 4) - base, 3 << base>(load<Bytes>(block + VECTOR * (base + S / 4)));
    }
    if constexpr ((P & 1) != 0) {
        constexpr int base = P & 6;
        codes |= field<S - base, 1 << base>(load<Bytes>(block + VECTOR * base));
    }
    return codes;
}

// Sums for N columns of x (M tokens of D digits), each in C parts so that one addition need not wait for the last.
template <int N, int C>
struct Accumulator {
    Ints sums[N][C][PARTS];
};

template <class V, int P, int N, int C, int S>
inline void multiply_step(Accumulator<N, C>& all, const uint8_t* block, const int8_t* x) {
    for (int part = 0; part < PARTS; ++part) {
        const Bytes codes = step_codes<P, S>(block + VECTOR_BYTES * part);
        UNROLL for (int i = 0; i < N; ++i)
            V::template dot<P>(all.sums[i][S % C][part], codes, x + STEP * (S * N + i));
    }
}

template <class V, int P, int N, int C, int... S>
inline void multiply_block(Accumulator<N, C>& all, const uint8_t* block, const int8_t* x,
                           std::integer_sequence<int, S...>) {
    (multiply_step<V, P, N, C, S>(all, block, x), ...);
}

// How far ahead memory is asked for: the hardware looks no further than a page of 4 KiB, and follows few streams. Codes
// are asked into L2 first: L1 can wait for few lines at a time, no match for the latency of DRAM.
constexpr int64_t BYTES_TO_L2 = 8192, BYTES_TO_L1 = 2048, GROUPS_AHEAD = 16;

// What a group's sums are corrected and multiplied with, for LANES rows.
struct Group {
    Ints zero, total;
    Floats scale;
};

// The groups of a tile.
template <class V>
class Groups {
   public:
    Groups(const Weight& weight, int64_t tile)
        : narrow_(weight.narrow), zero_(table_of<uint8_t>(weight, weight.zero_at, tile)),
          scale_(table_of<float>(weight, weight.scale_at, narrow_ ? 0 : tile)),
          total_(table_of<int32_t>(weight, weight.total_at, narrow_ ? 0 : tile)),
          half_(table_of<uint16_t>(weight, weight.scale_at, tile)),
          short_(table_of<int16_t>(weight, weight.total_at, tile)) {}

    Group at(int64_t g, int part, int offset) const {
        const int64_t entry = TILE * g + LANES * part;
        return {__builtin_convertvector(load<Octets>(zero_ + entry), Ints) - offset,
                narrow_ ? __builtin_convertvector(load<Shorts>(short_ + entry), Ints) : load<Ints>(total_ + entry),
                narrow_ ? V::halves(half_ + entry) : load<Floats>(scale_ + entry)};
    }
    void prefetch(int64_t g) const {
        __builtin_prefetch(zero_ + TILE * g);
        __builtin_prefetch(narrow_ ? static_cast<const void*>(half_ + TILE * g) : scale_ + TILE * g);
        __builtin_prefetch(narrow_ ? static_cast<const void*>(short_ + TILE * g) : total_ + TILE * g);
    }

   private:
    const bool narrow_;
    const uint8_t* zero_;
    const float* scale_;
    const int32_t* total_;
    const uint16_t* half_;
    const int16_t* short_;
};

inline Floats to_floats(Ints numbers) { return __builtin_convertvector(numbers, Floats); }

// What a segment adds to y, from its sums without zero points. At A16 they are D digits, STRIDE apart.
inline Floats term(Ints sum, const Group& group, int32_t x_zero) {
    return to_floats(sum - group.total * x_zero) * group.scale;
}

template <int D, int STRIDE>
inline Floats term(const Floats* digits, const Group& group, float x_scale) {
    Floats value = digits[0];
    for (int d = 1; d < D; ++d) value = value * 256.0f + digits[d * STRIDE];
    return value * group.scale * x_scale;
}

template <class V, int P, int D, int M>
void product(const Weight& weight, const Tokens& tokens, int64_t tile, int64_t strip, float* out) {
    constexpr int N = D * M, C = (N + 3) / N;
    const Columns& columns = weight.columns;
    const Groups<V> groups(weight, tile);
    const uint8_t* codes = codes_of(weight, tile);
    const int8_t* x = tokens.codes + strip * tokens.codes_per_strip;
    const float* x_scale = tokens.scale + strip * M * (D == 1 ? 1 : tokens.segments);
    const int32_t *x_zero = tokens.zero + strip * M, *x_sums = tokens.sums + strip * tokens.segments * N;
    Floats y[M][PARTS] = {};

    for (int64_t g = 0; g < columns.groups; ++g) {
        if (columns.groups > 1) groups.prefetch(g + GROUPS_AHEAD);
        int64_t left = g + 1 < columns.groups ? columns.group_blocks : columns.last_blocks;
        for (int64_t blocks; left > 0; left -= blocks, x_sums += N) {
            blocks = D > 1 && SEGMENT_BLOCKS < left ? SEGMENT_BLOCKS : left;
            Accumulator<N, C> all{};
            for (int64_t b = 0; b < blocks; ++b, codes += VECTOR * P, x += BLOCK * N) {
                for (int line = 0; line < P; ++line) {
                    __builtin_prefetch(codes + BYTES_TO_L2 + VECTOR * line, 0, 2);
                    __builtin_prefetch(codes + BYTES_TO_L1 + VECTOR * line);
                }
                multiply_block<V, P>(all, codes, x, std::make_integer_sequence<int, STEPS>());
            }

            for (int part = 0; part < PARTS; ++part) {
                const Group group = groups.at(g, part, V::template CODE_OFFSET<P>);
                Ints sums[N];
                UNROLL for (int i = 0; i < N; ++i) {
                    sums[i] = all.sums[i][0][part];
                    for (int c = 1; c < C; ++c) sums[i] += all.sums[i][c][part];
                    sums[i] -= group.zero * x_sums[i];
                }
                if constexpr (D == 1) {
                    UNROLL for (int m = 0; m < M; ++m) y[m][part] += term(sums[m], group, x_zero[m]);
                } else {
                    Floats digits[N];
                    UNROLL for (int i = 0; i < N; ++i) digits[i] = to_floats(sums[i]);
                    UNROLL for (int m = 0; m < M; ++m) y[m][part] += term<D, M>(digits + m, group, x_scale[m]);
                }
            }
            if constexpr (D > 1) x_scale += M;
        }
    }
    UNROLL for (int m = 0; m < M; ++m)
        for (int part = 0; part < PARTS; ++part) {
            const Floats row = D == 1 ? y[m][part] * x_scale[m] : y[m][part];
            std::memcpy(out + TILE * m + LANES * part, &row, sizeof row);
        }
}

// 1, 2, 4 ... tokens, up to what the registers hold.
template <class V>
int width_of(int64_t tokens, int digits) {
    const int most = digits == 1 ? V::MOST_TOKENS : V::MOST_TOKENS_A16;
    int width = 1;
    while (width < most && width < tokens) width *= 2;
    return width;
}

template <class V, int P, int D, int M = 1>
Product by_width(int width) {
    if constexpr (M <= (D == 1 ? V::MOST_TOKENS : V::MOST_TOKENS_A16)) {
        return width == M ? product<V, P, D, M> : by_width<V, P, D, 2 * M>(width);
    } else {
        return nullptr;
    }
}

template <class V, int P = 1>
Product product_of(int planes, int digits, int width) {
    if constexpr (P <= 8) {
        if (planes != P) return product_of<V, P + 1>(planes, digits, width);
        return digits == 1 ? by_width<V, P, 1>(width) : by_width<V, P, 3>(width);
    } else {
        return nullptr;
    }
}

}  // namespace
}  // namespace abq
