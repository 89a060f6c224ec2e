// A decoder of the llama family: one call a token. Weights belong to the caller, keys and values to the decoder.
#pragma once

#include <mutex>
#include <vector>

#include "linear.h"

namespace abq {

struct DecoderShape {
    int64_t hidden, intermediate, heads, key_heads, dimension, vocabulary;
    int64_t capacity;  // positions
    float epsilon;
    Format activation, keys;  // keys: of the cache, 16 is fp16
};

struct Block {
    const float *attention_norm, *mlp_norm;  // [hidden]
    const float *query_norm, *key_norm;      // [dimension], or null
    Linear query, key, value, output, gate, up, down;
};

// Either fp16 rows [vocabulary][hidden], or a packed weight and the format of its input.
struct OutputHead {
    const uint16_t* rows;
    const Weight* weight;
    Format activation;
};

class Decoder {
   public:
    // cosine, sine: [capacity][dimension / 2]
    Decoder(const Level& level, const DecoderShape& shape, std::vector<Block> blocks, const float* cosine,
            const float* sine, const float* norm, const OutputHead& head);

    // Reads embeddings [count][hidden] as the next positions; logits [count][vocabulary] if `all`, else of the last.
    void step(const float* embeddings, int64_t count, float* logits, bool all, int threads);

    int64_t length() const { return length_; }
    void truncate(int64_t length) { length_ = length; }  // forgets what came after

   private:
    void block(const Block& block, int64_t index, int64_t count, int threads);
    void attend(const Block& block, int64_t index, int64_t count, int threads);
    void rotate(float* vector, int64_t position, const float* norm) const;
    void logits(const float* x, float* out, int threads);

    const Level& level_;
    const DecoderShape shape_;
    const std::vector<Block> blocks_;
    const float *cosine_, *sine_, *norm_;
    const OutputHead head_;
    int64_t length_ = 0;
    Buffer cache_;
    std::vector<Head> heads_;  // [block][key head]
    std::vector<float> stream_, normed_, query_, key_, value_, mixed_, gate_, up_;
    std::mutex one_at_a_time_;
};

}  // namespace abq
