#include "tokens.h"

#include "buffer.h"

namespace abq {

Tokens::Tokens(Format format, const Columns& columns, int64_t count, int width, Buffer& memory)
    : format(format), columns(columns), count(count), digits(format.bits == 16 ? 3 : 1), width(width) {
    max_code = (1 << format.bits) - 1;
    offset = format.bits == 8 ? 128 : 0;
    strips = (count + width - 1) / width;
    segment_blocks = digits == 1 ? columns.group_blocks : SEGMENT_BLOCKS;
    auto cut = [&](int64_t blocks) { return (blocks + segment_blocks - 1) / segment_blocks; };
    segments = (columns.groups - 1) * cut(columns.group_blocks) + cut(columns.last_blocks);
    by_rows = width > MOST_TOKENS_BY_STEPS;
    auto padded = [&](int64_t blocks) { return by_rows ? (blocks + 1) / 2 * 2 : blocks; };
    const int64_t blocks = (columns.groups - 1) * padded(columns.group_blocks) + padded(columns.last_blocks);
    codes_per_strip = blocks * BLOCK * digits * width;

    const int64_t code_bytes = align(strips * codes_per_strip);
    const int64_t scale_bytes = align(strips * width * (digits == 1 ? 1 : segments) * 4);
    const int64_t zero_bytes = align(strips * width * 4);
    const int64_t sum_bytes = align(strips * segments * digits * width * 4);
    uint8_t* at = memory.reserve(code_bytes + scale_bytes + zero_bytes + sum_bytes);
    codes = reinterpret_cast<int8_t*>(at);
    scale = reinterpret_cast<float*>(at += code_bytes);
    zero = reinterpret_cast<int32_t*>(at += scale_bytes);
    sums = reinterpret_cast<int32_t*>(at += zero_bytes);
}

}  // namespace abq
