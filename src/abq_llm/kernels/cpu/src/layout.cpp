#include "layout.h"

namespace abq {

Weight describe(int64_t rows, int64_t columns, int64_t group, int planes, int max_code, bool narrow) {
    auto blocks = [](int64_t count) { return (count + BLOCK - 1) / BLOCK; };
    Weight weight{};
    Columns& cut = weight.columns;
    cut.count = columns, cut.group = group;
    cut.groups = (columns + group - 1) / group;
    cut.group_blocks = blocks(group);
    cut.last_blocks = blocks(columns - (cut.groups - 1) * group);
    cut.blocks = (cut.groups - 1) * cut.group_blocks + cut.last_blocks;

    weight.rows = rows, weight.tiles = (rows + TILE - 1) / TILE;
    weight.planes = planes, weight.max_code = max_code, weight.narrow = narrow;
    const int64_t entries = weight.tiles * cut.groups * TILE, wide = narrow ? 2 : 4;
    weight.codes_at = align(sizeof weight);
    weight.scale_at = weight.codes_at + align(weight.tiles * cut.blocks * VECTOR * planes);
    weight.total_at = weight.scale_at + align(entries * wide);
    weight.zero_at = weight.total_at + align(entries * wide);
    weight.bytes = weight.zero_at + align(entries);
    return weight;
}

}  // namespace abq
