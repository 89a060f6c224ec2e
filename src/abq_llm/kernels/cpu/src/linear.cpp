#include "linear.h"

#include <algorithm>

#include "threads.h"

namespace abq {
namespace {

constexpr int64_t CACHED_TOKENS = 768 * 1024;  // bytes of codes that stay in a core's L2 while tiles pass by
constexpr int TASKS_PER_THREAD = 8;            // so that a slow thread holds up the others for an eighth at most

void multiply_tile(const Linear& layer, const Tokens& tokens, Product product, int64_t tile, int64_t strip) {
    alignas(64) float out[MOST_WIDTH * TILE];
    product(*layer.weight, tokens, tile, strip, out);
    const int64_t all = layer.weight->rows, n = tile * TILE, rows = std::min<int64_t>(TILE, all - n);
    const int64_t first = strip * tokens.width, last = std::min(tokens.count, first + tokens.width);
    for (int64_t m = first; m < last; ++m) {
        const float* from = out + (m - first) * TILE;
        float* to = layer.y + m * all + n;
        for (int64_t row = 0; row < rows; ++row) to[row] = layer.bias ? from[row] + layer.bias[n + row] : from[row];
    }
}

}  // namespace

const Level& able(const Level& level, const Weight& weight, Format format) {
    const int64_t most = format.bits == 16 ? 0 : int64_t(weight.max_code) * ((1 << format.bits) - 1);
    return weight.planes > 8 || most * weight.columns.group > INT32_MAX ? scalar : level;
}

Tokens quantize(const Level& level, const float* x, int64_t count, const Columns& columns, Format format,
                Buffer& memory, int threads) {
    const Tokens tokens(format, columns, count, level.width(count, format.bits == 16 ? 3 : 1), memory);
    constexpr int64_t AT_ONCE = MOST_TOKENS_BY_STEPS;  // tokens of one strip share cache lines
    parallel((count + AT_ONCE - 1) / AT_ONCE, threads, [&](int64_t task) {
        const int64_t first = task * AT_ONCE, last = std::min(count, first + AT_ONCE);
        for (int64_t m = first; m < last; ++m) level.quantize(x + m * columns.count, tokens, m);
    });
    return tokens;
}

void multiply(const Level& level, const Tokens& tokens, const std::vector<Linear>& layers, int threads) {
    const Product product = level.product(layers[0].weight->planes, tokens.digits, tokens.width);
    const int64_t strips_at_once = std::max<int64_t>(1, CACHED_TOKENS / tokens.codes_per_strip);
    const int64_t turns = (tokens.strips + strips_at_once - 1) / strips_at_once;
    int64_t tiles = 0;
    for (const Linear& layer : layers) tiles += layer.weight->tiles;
    const int64_t chunk = std::max<int64_t>(1, tiles / (int64_t(threads) * TASKS_PER_THREAD));
    const int64_t chunks = (tiles + chunk - 1) / chunk;
    parallel(turns * chunks, threads, [&](int64_t task) {
        const int64_t first = task / chunks * strips_at_once, last = std::min(tokens.strips, first + strips_at_once);
        int64_t tile = task % chunks * chunk, end = std::min(tiles, tile + chunk);
        for (const Linear& layer : layers) {  // the chunk's part of each
            for (; tile < std::min(end, layer.weight->tiles); ++tile)
                for (int64_t strip = first; strip < last; ++strip) multiply_tile(layer, tokens, product, tile, strip);
            tile = std::max<int64_t>(0, tile - layer.weight->tiles), end -= layer.weight->tiles;
        }
    });
}

void linear(const Level& wanted, const float* x, int64_t count, Format format, const std::vector<Linear>& layers,
            int threads) {
    static thread_local Buffer memory;
    const Weight& weight = *layers[0].weight;
    const Level& level = able(wanted, weight, format);
    multiply(level, quantize(level, x, count, weight.columns, format, memory, threads), layers, threads);
}

}  // namespace abq
