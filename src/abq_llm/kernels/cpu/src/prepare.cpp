#include "prepare.h"

#include <algorithm>
#include <bitset>
#include <cstring>

#include "threads.h"

namespace abq {
namespace {

// Bits [first, first + count) of a row of a plane, count <= 32, as the low bits of a word.
uint32_t bits_of(const uint32_t* row, int64_t first, int64_t count) {
    const int64_t word = first / 32, shift = first % 32;
    uint64_t bits = row[word];
    if (shift + count > 32) bits |= uint64_t(row[word + 1]) << 32;
    return uint32_t(bits >> shift) & uint32_t((uint64_t(1) << count) - 1);
}

// Bit j of a nibble -> bit 0 of byte j.
uint32_t spread(uint32_t nibble) { return (nibble * 0x00204081u) & 0x01010101u; }

// 32 columns of one row, a word for each plane -> the row's bytes of a block.
void pack_block(const uint32_t* planes, int count, int row, uint8_t* block) {
    for (int base = 0, piece = 8; piece > 0; piece /= 2) {
        if ((count & piece) == 0) continue;
        for (int vector = 0; vector < piece; ++vector) {
            uint32_t bytes = 0;
            for (int field = 0; field < 8 / piece; ++field) {
                const int step = 8 / piece * vector + field;
                for (int bit = 0; bit < piece; ++bit)
                    bytes |= spread(planes[base + bit] >> (STEP * step) & 15) << (piece * field + bit);
            }
            std::memcpy(block + VECTOR * (base + vector) + STEP * row, &bytes, sizeof bytes);
        }
        base += piece;
    }
}

class Writer {
   public:
    Writer(const Weight& weight, const Packed& packed, uint8_t* out) : weight_(weight), packed_(packed), out_(out) {}

    void tile(int64_t tile) const {
        std::memset(codes(tile), 0, codes(1) - codes(0));
        for (int row = 0; row < std::min<int64_t>(TILE, weight_.rows - tile * TILE); ++row) this->row(tile, row);
    }

   private:
    void row(int64_t tile, int row) const {
        const Columns& columns = weight_.columns;
        const int64_t n = tile * TILE + row, words = (columns.count + 31) / 32;
        uint8_t* block = codes(tile);
        for (int64_t g = 0; g < columns.groups; ++g) {
            const int64_t first = g * columns.group, end = std::min(columns.count, first + columns.group);
            int64_t sum = 0;
            for (int64_t k = first; k < end; k += BLOCK, block += VECTOR * weight_.planes) {
                uint32_t planes[9];
                for (int p = 0; p < weight_.planes; ++p) {
                    const uint32_t* plane = packed_.planes + (p * weight_.rows + n) * words;
                    planes[p] = bits_of(plane, k, std::min<int64_t>(BLOCK, end - k));
                    sum += int64_t(std::bitset<32>(planes[p]).count()) << p;
                }
                pack_block(planes, weight_.planes, row, block);
            }
            const int64_t from = n * columns.groups + g, to = (tile * columns.groups + g) * TILE + row;
            const int32_t zero = packed_.zero ? packed_.zero[from] : packed_.fixed_zero;
            const int64_t total = sum - zero * (end - first);
            put(weight_.zero_at, to, uint8_t(zero));
            if (weight_.narrow) {
                put(weight_.total_at, to, int16_t(total));
                put(weight_.scale_at, to, static_cast<const uint16_t*>(packed_.scale)[from]);
            } else {
                put(weight_.total_at, to, int32_t(total));
                put(weight_.scale_at, to, static_cast<const float*>(packed_.scale)[from]);
            }
        }
    }

    uint8_t* codes(int64_t tile) const { return const_cast<uint8_t*>(codes_of(weight_, tile)); }

    template <class T>
    void put(int64_t table, int64_t entry, T value) const {
        reinterpret_cast<T*>(out_ + table)[entry] = value;
    }

    const Weight& weight_;  // in its place, at `out`
    const Packed packed_;
    uint8_t* const out_;
};

}  // namespace

void prepare(const Weight& header, const Packed& packed, void* out, int threads) {
    uint8_t* at = static_cast<uint8_t*>(out);
    std::memset(at, 0, header.codes_at);
    std::memcpy(at, &header, sizeof header);
    std::memset(at + header.scale_at, 0, header.bytes - header.scale_at);
    const Writer writer(*static_cast<const Weight*>(out), packed, at);
    parallel(header.tiles, threads, [&](int64_t tile) { writer.tile(tile); });
}

}  // namespace abq
