#include "linear.h"

#include "buffer.h"
#include "threads.h"

namespace abq {
namespace {

constexpr int64_t CACHED_TOKENS = 384 * 1024;  // bytes of codes that stay in a core's L2 while tiles pass by
constexpr int TASKS_PER_THREAD = 8;            // so that a slow thread holds up the others for an eighth at most

// The vector levels sum in 32 bits and know eight planes.
const Level& able(const Level& level, const Weight& weight, Format format) {
    const int64_t most = format.bits == 16 ? 0 : int64_t(weight.max_code) * ((1 << format.bits) - 1);
    return weight.planes > 8 || most * weight.columns.group > INT32_MAX ? scalar : level;
}

}  // namespace

void linear(const Level& wanted, const float* x, int64_t count, const Weight& weight, const float* bias, Format format,
            float* y, int threads) {
    static thread_local Buffer memory;
    const Level& level = able(wanted, weight, format);
    const Tokens tokens(format, weight.columns, count, level.width(count, format.bits == 16 ? 3 : 1), memory);
    parallel(count, threads, [&](int64_t m) { level.quantize(x + m * weight.columns.count, tokens, m); });

    const Product product = level.product(weight.planes, tokens.digits, tokens.width);
    const int64_t strips_at_once = std::max<int64_t>(1, CACHED_TOKENS / tokens.codes_per_strip);
    const int64_t turns = (tokens.strips + strips_at_once - 1) / strips_at_once;
    const int64_t chunk = std::max<int64_t>(1, weight.tiles / (int64_t(threads) * TASKS_PER_THREAD));
    const int64_t chunks = (weight.tiles + chunk - 1) / chunk;
    parallel(turns * chunks, threads, [&](int64_t task) {
        const int64_t first_strip = task / chunks * strips_at_once;
        const int64_t last_strip = std::min(tokens.strips, first_strip + strips_at_once);
        const int64_t first_tile = task % chunks * chunk, last_tile = std::min(weight.tiles, first_tile + chunk);
        float out[MOST_WIDTH * TILE];
        for (int64_t tile = first_tile; tile < last_tile; ++tile) {
            const int64_t n = tile * TILE, rows = std::min<int64_t>(TILE, weight.rows - n);
            for (int64_t strip = first_strip; strip < last_strip; ++strip) {
                product(weight, tokens, tile, strip, out);
                for (int64_t m = strip * tokens.width; m < std::min(count, (strip + 1) * tokens.width); ++m) {
                    const float* from = out + m % tokens.width * TILE;
                    for (int64_t row = 0; row < rows; ++row)
                        y[m * weight.rows + n + row] = bias ? from[row] + bias[n + row] : from[row];
                }
            }
        }
    });
}

}  // namespace abq
