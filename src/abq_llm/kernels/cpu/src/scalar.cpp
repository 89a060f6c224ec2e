// The level that every other one is compared with: plain loops, exact for any planes and any number of columns.
//
//     y[m,n] = s_x[m] sum_g s_w[n,g] sum_{k in g} (q_w[n,k] - z_w[n,g]) (q_x[m,k] - z_x[m])
//
// The sum over k is an integer. At A16 it has three digits, and s_x stands inside the sum over segments.
#include <vector>

#define VECTOR_BYTES 16
#include "attention.h"
#include "half.h"
#include "level.h"
#include "quantize.h"

namespace abq {
namespace {

// The code of one row at one column of a block: layout.h, backwards.
int16_t code_of(const uint8_t* block, int planes, int row, int column) {
    const int step = column / STEP;
    int16_t code = 0;
    for (int base = 0, piece = 8; piece > 0; piece /= 2) {
        if ((planes & piece) == 0) continue;
        const int fields = 8 / piece, vector = step / fields, field = step % fields;
        const int byte = block[VECTOR * (base + vector) + STEP * row + column % STEP];
        code |= int16_t((byte >> (piece * field) & ((1 << piece) - 1)) << base);
        base += piece;
    }
    return code;
}

// sum over columns [first, last) of (code - zero) * (x's code of a digit - x_zero), in a token of a strip.
int64_t sum_of_products(const int16_t* codes, int zero, const Tokens& tokens, int64_t strip, int lane, int digit,
                        int64_t first, int64_t last) {
    const int8_t* x = tokens.codes + strip * tokens.codes_per_strip;
    const int x_zero = tokens.digits == 1 ? tokens.zero[strip * tokens.width + lane] : 0;
    int64_t sum = 0;
    for (int64_t k = first; k < last; ++k) {
        const int64_t step = (k / STEP * tokens.digits + digit) * tokens.width + lane;
        sum += (codes[k] - zero) * (x[step * STEP + k % STEP] - x_zero);
    }
    return sum;
}

void product(const Weight& weight, const Tokens& tokens, int64_t tile, int64_t strip, float* out) {
    const Columns& columns = weight.columns;
    std::vector<int16_t> codes(columns.blocks * BLOCK);
    for (int row = 0; row < TILE; ++row) {
        for (int64_t k = 0; k < columns.blocks * BLOCK; ++k)
            codes[k] = code_of(codes_of(weight, tile) + k / BLOCK * VECTOR * weight.planes, weight.planes, row, k % BLOCK);
        for (int lane = 0; lane < tokens.width; ++lane) {
            const float* x_scale = tokens.scale + strip * tokens.width * (tokens.digits == 1 ? 1 : tokens.segments) + lane;
            float y = 0;
            for (int64_t g = 0; g < columns.groups; ++g) {
                const int zero = table_of<uint8_t>(weight, weight.zero_at, tile)[g * TILE + row];
                const float scale = weight.narrow
                                        ? float_of_half(table_of<uint16_t>(weight, weight.scale_at, tile)[g * TILE + row])
                                        : table_of<float>(weight, weight.scale_at, tile)[g * TILE + row];
                const int64_t first = g * columns.group_blocks * BLOCK;
                const int64_t last = first + group_columns(columns, g);
                auto sum = [&](int digit, int64_t from, int64_t to) {
                    return float(sum_of_products(codes.data(), zero, tokens, strip, lane, digit, from, to));
                };
                if (tokens.digits == 1) {
                    y += sum(0, first, last) * scale;
                    continue;
                }
                for (int64_t k = first; k < last; k += SEGMENT_BLOCKS * BLOCK, x_scale += tokens.width) {
                    const int64_t end = smaller(last, k + SEGMENT_BLOCKS * BLOCK);
                    y += ((sum(0, k, end) * 256 + sum(1, k, end)) * 256 + sum(2, k, end)) * scale * *x_scale;
                }
            }
            out[TILE * lane + row] = tokens.digits == 1 ? y * *x_scale : y;
        }
    }
}

// What attention.h asks of a level; fp16 numbers one by one.
struct Scalar {
    static Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
    static Floats halves(const uint16_t* from) {
        Floats floats;
        for (int i = 0; i < LANES; ++i) floats[i] = float_of_half(from[i]);
        return floats;
    }
    static void to_halves(Floats floats, uint16_t* to) {
        for (int i = 0; i < LANES; ++i) to[i] = half_of_float(floats[i]);
    }
};

bool supported() { return true; }
int width_of(int64_t tokens, int) { return int(smaller(tokens, 8)); }
Product product_of(int, int, int) { return product; }

}  // namespace

const Level scalar{"scalar", supported,     width_of,       quantize,       product_of, norm,
                   swiglu,   dense<Scalar>, append<Scalar>, attend<Scalar>};

}  // namespace abq
