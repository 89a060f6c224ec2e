// Compares every level that this CPU supports with `scalar`: products bit for bit, attention to the rounding of fp32
// sums. Prints a line for each and returns how many cases differ. Without Python, so that a build for another architecture can run under an emulator.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "buffer.h"
#include "linear.h"
#include "prepare.h"

namespace {

std::mt19937 random_bits(0);

int uniform(int low, int high) { return low + int(random_bits() % unsigned(high - low + 1)); }

struct Case {
    int planes, bits;
    bool symmetric, narrow, with_zero, with_bias;
    int64_t rows, columns, group, tokens;
};

Case draw() {
    const int widths[] = {1, 2, 3, 4, 5, 6, 7, 8, 16};
    Case c{uniform(1, 9), widths[uniform(0, 8)], uniform(0, 1) == 1, false, uniform(0, 1) == 1, uniform(0, 1) == 1,
           uniform(1, 50), uniform(1, 400), 0, uniform(1, 100)};
    c.group = uniform(0, 1) == 1 ? c.columns : uniform(1, int(c.columns));
    c.narrow = uniform(0, 1) == 1 && c.group < 128;
    return c;
}

// Whether `level` and `scalar` agree on random codes, scales and tokens.
bool agree(const abq::Level& level, const Case& c) {
    const int max_code = c.planes == 9 ? 256 : (1 << c.planes) - 1;
    const int64_t words = (c.columns + 31) / 32, groups = (c.columns + c.group - 1) / c.group;
    std::vector<uint32_t> planes(c.planes * c.rows * words, 0);
    for (int64_t n = 0; n < c.rows; ++n)
        for (int64_t k = 0; k < c.columns; ++k) {
            const int code = uniform(0, max_code);
            for (int p = 0; p < c.planes; ++p)
                planes[(p * c.rows + n) * words + k / 32] |= uint32_t(code >> p & 1) << k % 32;
        }
    std::vector<float> wide(c.rows * groups);
    std::vector<uint16_t> narrow(c.rows * groups);
    std::vector<uint8_t> zero(c.rows * groups);
    for (auto& value : wide) value = float(uniform(1, 1000)) / 1000;
    for (auto& value : narrow) value = uint16_t(uniform(1, 0x3c00));  // subnormals .. 1
    for (auto& value : zero) value = uint8_t(uniform(0, max_code > 255 ? 255 : max_code));
    std::vector<float> x(c.tokens * c.columns), bias(c.rows), y[2];
    for (auto& value : x) value = float(uniform(-1000, 2000)) / 997;
    for (auto& value : bias) value = float(uniform(-1000, 1000)) / 10;

    abq::Buffer memory;
    const abq::Weight header = abq::describe(c.rows, c.columns, c.group, c.planes, max_code, c.narrow);
    void* weight = memory.reserve(header.bytes);
    const abq::Packed packed{planes.data(), c.narrow ? (const void*)narrow.data() : wide.data(),
                             c.with_zero ? zero.data() : nullptr, 1 << (c.planes - 1) & 255};
    abq::prepare(header, packed, weight, 2);
    const abq::Level* both[] = {&abq::scalar, &level};
    for (int i = 0; i < 2; ++i) {
        y[i].assign(c.tokens * c.rows, 0);
        abq::linear(*both[i], x.data(), c.tokens, {c.bits, c.symmetric},
                    {{static_cast<abq::Weight*>(weight), c.with_bias ? bias.data() : nullptr, y[i].data()}}, 1 + i);
    }
    return std::memcmp(y[0].data(), y[1].data(), y[0].size() * sizeof(float)) == 0;
}

// Whether attention over random keys and values is that of `scalar`, whose sums are in another order.
bool attends_alike(const abq::Level& level) {
    const int widths[] = {1, 4, 5, 8, 16};
    const int64_t d = 32 * uniform(1, 4), length = uniform(1, 70), positions = 80;
    const int bits = widths[uniform(0, 4)], queries = uniform(1, 6);
    std::vector<float> key(length * d), value(length * d), query(queries * d), out[2], scores(4 * (positions + 16));
    for (auto* numbers : {&key, &value, &query})
        for (auto& number : *numbers) number = float(uniform(-1000, 2000)) / 997;
    const bool symmetric = uniform(0, 1) == 1;
    const abq::Level* both[] = {&abq::scalar, &level};
    for (int i = 0; i < 2; ++i) {
        std::vector<uint8_t> codes[2], zeros[2];
        std::vector<float> scales[2];
        for (int j = 0; j < 2; ++j) codes[j].resize(2 * positions * d), zeros[j].resize(positions), scales[j].resize(positions);
        const abq::Head head{d, bits, symmetric, codes[0].data(), codes[1].data(), scales[0].data(), scales[1].data(),
                             zeros[0].data(), zeros[1].data()};
        for (int64_t p = 0; p < length; ++p) both[i]->append(head, p, key.data() + p * d, value.data() + p * d);
        out[i].resize(queries * d);
        both[i]->attend(head, length, query.data(), queries, 0.2f, scores.data(), out[i].data());
    }
    for (size_t i = 0; i < out[0].size(); ++i)
        if (!(std::fabs(out[0][i] - out[1][i]) < 1e-4f)) return false;
    return true;
}

}  // namespace

int main() {
    int wrong = 0;
    for (int i = 0; i < abq::level_count; ++i) {
        const abq::Level& level = *abq::levels[i];
        if (!level.supported()) continue;
        int cases = 0, bad = 0;
        for (random_bits.seed(0); cases < 400; ++cases) {
            const Case c = draw();
            if (agree(level, c)) continue;
            ++bad;
            std::printf("%s differs: W%dA%d%s %ld x %ld, groups of %ld, %ld tokens\n", level.name, c.planes, c.bits,
                        c.symmetric ? " symmetric" : "", long(c.rows), long(c.columns), long(c.group), long(c.tokens));
        }
        for (int i = 0; i < 100; ++i, ++cases) bad += !attends_alike(level);
        std::printf("%s: %d of %d cases as scalar\n", level.name, cases - bad, cases);
        wrong += bad;
    }
    return wrong > 255 ? 255 : wrong;
}
