#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace abq {
namespace {

constexpr int64_t CHUNK = 256;        // tokens of a prompt that go through the blocks together
constexpr int64_t DENSE_ROWS = 256;  // of the head, a task
constexpr int MOST_HEADS_AT_ONCE = 4;

void add(std::vector<float>& stream, const std::vector<float>& delta, int64_t count) {
    for (int64_t i = 0; i < count; ++i) stream[i] += delta[i];
}

}  // namespace

Decoder::Decoder(const Level& level, const DecoderShape& shape, std::vector<Block> blocks, const float* cosine,
                 const float* sine, const float* norm, const OutputHead& head)
    : level_(level), shape_(shape), blocks_(std::move(blocks)), cosine_(cosine), sine_(sine), norm_(norm), head_(head) {
    const int64_t positions = (shape.capacity + TILE - 1) / TILE * TILE, bits = shape.keys.bits;
    const int64_t codes = align(positions * shape.dimension * (bits == 16 ? 4 : bits > 4 ? 2 : 1) / 2);
    const int64_t scales = bits == 16 ? 0 : positions * sizeof(float), zeros = bits == 16 ? 0 : align(positions);
    const int64_t count = int64_t(blocks_.size()) * shape.key_heads;
    uint8_t* at = cache_.reserve(count * 2 * (codes + scales + zeros));
    std::fill_n(at, count * 2 * (codes + scales + zeros), 0);
    auto next = [&](int64_t bytes) { return (at += bytes) - bytes; };
    for (int64_t i = 0; i < count; ++i) {
        Head cached{shape.dimension, int(bits), shape.keys.symmetric};
        cached.keys = next(codes), cached.values = next(codes);
        cached.key_scale = reinterpret_cast<float*>(next(scales)), cached.key_zero = next(zeros);
        cached.value_scale = reinterpret_cast<float*>(next(scales)), cached.value_zero = next(zeros);
        heads_.push_back(cached);
    }
    for (auto* buffer : {&stream_, &normed_}) buffer->resize(CHUNK * std::max(shape.hidden, shape.heads * shape.dimension));
    for (auto* buffer : {&query_, &mixed_}) buffer->resize(CHUNK * shape.heads * shape.dimension);
    for (auto* buffer : {&key_, &value_}) buffer->resize(CHUNK * shape.key_heads * shape.dimension);
    for (auto* buffer : {&gate_, &up_}) buffer->resize(CHUNK * shape.intermediate);
}

void Decoder::step(const float* embeddings, int64_t count, float* out, bool all, int threads) {
    const std::lock_guard<std::mutex> lock(one_at_a_time_);
    for (int64_t first = 0; first < count; first += CHUNK) {
        const int64_t now = std::min(CHUNK, count - first);
        std::copy_n(embeddings + first * shape_.hidden, now * shape_.hidden, stream_.begin());
        for (size_t i = 0; i < blocks_.size(); ++i) block(blocks_[i], int64_t(i), now, threads);
        length_ += now;
        for (int64_t m = all ? 0 : now - 1; m < now && (all || first + now == count); ++m)
            logits(stream_.data() + m * shape_.hidden, out + (all ? (first + m) * shape_.vocabulary : 0), threads);
    }
}

void Decoder::block(const Block& block, int64_t index, int64_t count, int threads) {
    auto norm = [&](const float* weight) {
        parallel(count, threads, [&](int64_t m) {
            const int64_t at = m * shape_.hidden;
            level_.norm(stream_.data() + at, weight, shape_.epsilon, shape_.hidden, normed_.data() + at);
        });
    };
    auto apply = [&](const std::vector<float>& x, std::vector<Linear> layers) {
        linear(level_, x.data(), count, shape_.activation, layers, threads);
    };
    auto to = [](Linear layer, std::vector<float>& y) {
        layer.y = y.data();
        return layer;
    };
    norm(block.attention_norm);
    apply(normed_, {to(block.query, query_), to(block.key, key_), to(block.value, value_)});
    attend(block, index, count, threads);
    apply(mixed_, {to(block.output, normed_)});
    add(stream_, normed_, count * shape_.hidden);
    norm(block.mlp_norm);
    apply(normed_, {to(block.gate, gate_), to(block.up, up_)});
    parallel(count, threads, [&](int64_t m) {
        level_.swiglu(gate_.data() + m * shape_.intermediate, up_.data() + m * shape_.intermediate, shape_.intermediate);
    });
    apply(gate_, {to(block.down, normed_)});
    add(stream_, normed_, count * shape_.hidden);
}

void Decoder::attend(const Block& block, int64_t index, int64_t count, int threads) {
    const int64_t d = shape_.dimension, group = shape_.heads / shape_.key_heads;
    const float scaling = 1 / std::sqrt(float(d));
    auto append = [&](int64_t m, int64_t h) {
        float* key = key_.data() + (m * shape_.key_heads + h) * d;
        rotate(key, length_ + m, block.key_norm);
        level_.append(heads_[index * shape_.key_heads + h], length_ + m, key,
                      value_.data() + (m * shape_.key_heads + h) * d);
    };
    auto read = [&](int64_t m, int64_t h) {
        static thread_local Buffer memory;
        const int64_t length = length_ + m + 1;
        float* queries = query_.data() + (m * shape_.heads + h * group) * d;
        for (int64_t i = 0; i < group; ++i) rotate(queries + i * d, length_ + m, block.query_norm);
        auto* scores = reinterpret_cast<float*>(memory.reserve((length + TILE) * MOST_HEADS_AT_ONCE * sizeof(float)));
        level_.attend(heads_[index * shape_.key_heads + h], length, queries, int(group), scaling, scores,
                      mixed_.data() + (m * shape_.heads + h * group) * d);
    };
    if (count > 1)
        parallel(shape_.key_heads, threads, [&](int64_t h) {
            for (int64_t m = 0; m < count; ++m) append(m, h);
        });
    parallel(count * shape_.key_heads, threads, [&](int64_t task) {
        const int64_t m = task / shape_.key_heads, h = task % shape_.key_heads;
        if (count == 1) append(m, h);
        read(m, h);
    });
}

// RoPE turns the pairs (i, i + d/2); Qwen3 norms each head first.
void Decoder::rotate(float* vector, int64_t position, const float* norm) const {
    const int64_t half = shape_.dimension / 2;
    if (norm) level_.norm(vector, norm, shape_.epsilon, shape_.dimension, vector);
    const float *cosine = cosine_ + position * half, *sine = sine_ + position * half;
    for (int64_t i = 0; i < half; ++i) {
        const float a = vector[i], b = vector[i + half];
        vector[i] = a * cosine[i] - b * sine[i];
        vector[i + half] = b * cosine[i] + a * sine[i];
    }
}

void Decoder::logits(const float* x, float* out, int threads) {
    level_.norm(x, norm_, shape_.epsilon, shape_.hidden, normed_.data());
    if (head_.weight) {
        linear(level_, normed_.data(), 1, head_.activation, {{head_.weight, nullptr, out}}, threads);
        return;
    }
    parallel((shape_.vocabulary + DENSE_ROWS - 1) / DENSE_ROWS, threads, [&](int64_t task) {
        const int64_t first = task * DENSE_ROWS, rows = std::min(DENSE_ROWS, shape_.vocabulary - first);
        level_.dense(head_.rows + first * shape_.hidden, rows, shape_.hidden, normed_.data(), out + first);
    });
}

}  // namespace abq
