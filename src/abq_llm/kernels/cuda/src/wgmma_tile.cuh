// What the two Hopper products share: the block's tile in shared memory, who fills it, and how results leave it.
//
//   y[tokens, rows] of one tile:  `consumers` warpgroups, each `slabs` x 64 rows, all on the same tokens
//   shared memory:  | barriers | data of tokens, twice | stages of x ... | slots of weight planes ... | results on their way out |
//
// One more warpgroup produces: its first warp copies x into a ring of stages, its second the weights into a ring of slots
// (one slot is a k-block of 256 columns). Every piece is contiguous in global memory, so that plain bulk copies do.
//
// A block does tile after tile; while its consumers write the results of one, the producers fetch the next.
#pragma once
#include "epilogue.cuh"
#include "wgmma.cuh"

// chunks: of tokens x 16 bytes of x, in a k-block and in a stage; words_of_token: what else is known of one, at most three
template <class C, int chunks_per_block, int stage_chunks, int words_of_token> struct Tile {
    static constexpr int consumer_threads = C::consumers * 128;
    static constexpr int threads = consumer_threads + 128;
    static constexpr int row_tiles = C::consumers * C::slabs * 4;
    static constexpr int rows = row_tiles * 16;

    static constexpr int chunks_per_stage = stage_chunks;
    static constexpr int chunk_bytes = C::tokens * 16;
    static constexpr int stage_bytes = chunks_per_stage * chunk_bytes;
    static constexpr int stages_per_block = chunks_per_block / chunks_per_stage;
    static constexpr int tile_bytes = C::planes * 512;  // of one row tile's weights
    static constexpr int slot_bytes = row_tiles * tile_bytes;

    static constexpr int barrier_bytes = 384;
    static constexpr int token_words = words_of_token;  // scale, zero point, sum
    static constexpr int token_bytes = 3 * C::tokens * 4;
    static constexpr int x_offset = ceil_div(barrier_bytes + 2 * token_bytes, 128) * 128;
    static constexpr int weight_offset = x_offset + C::stages * stage_bytes;
    static constexpr int out_offset = weight_offset + C::weight_slots * slot_bytes;

    // Registers of a thread: what all start with, and what producers leave to consumers
    static constexpr int registers = 65536 / C::resident / threads / 8 * 8;
    static constexpr int producer_registers = 24;
    static constexpr int left_registers = (registers * threads - producer_registers * 128) / consumer_threads / 8 * 8;
    static constexpr int consumer_registers = left_registers < 240 ? left_registers : 240;
    static constexpr bool deals_registers = registers < consumer_registers;

    static_assert(C::tokens % 16 == 0 && chunks_per_block % chunks_per_stage == 0);
    static_assert((2 * (C::stages + C::weight_slots) + 4) * 8 <= barrier_bytes);
    static_assert(row_tiles <= 32 && chunks_per_stage <= 32, "one lane copies one piece");
};

// Results leave by warps, 16 rows each: bytes from one token's 16 results to the next one's in shared memory (16 more than
// they take, against bank conflicts), and tokens on their way at a time. A warp has room for twice as many.
template <class T> constexpr int out_pitch = 16 * sizeof(T) + 16;
template <class T> constexpr int out_tokens = 32 / sizeof(T);
constexpr int out_bytes = 2 * 16 * (16 * 2 + 16);  // of a warp
static_assert(2 * out_tokens<float> * out_pitch<float> <= out_bytes);

template <class C, class Shape> struct Shared {
    unsigned base;
    __device__ unsigned x_full(int stage) const { return base + stage * 8; }
    __device__ unsigned x_empty(int stage) const { return x_full(C::stages + stage); }
    __device__ unsigned weight_full(int slot) const { return x_full(2 * C::stages + slot); }
    __device__ unsigned weight_empty(int slot) const { return weight_full(C::weight_slots + slot); }
    __device__ unsigned tokens_full(int buffer) const { return weight_full(2 * C::weight_slots + buffer); }
    __device__ unsigned tokens_empty(int buffer) const { return tokens_full(2 + buffer); }
    __device__ unsigned token_data(int buffer) const { return base + Shape::barrier_bytes + buffer * Shape::token_bytes; }
    __device__ unsigned token_data(int buffer, int j, int lane) const { return token_data(buffer) + j * 32 + lane % 4 * 8; }
    __device__ unsigned x(int stage) const { return base + Shape::x_offset + stage * Shape::stage_bytes; }
    __device__ unsigned weight(int slot) const { return base + Shape::weight_offset + slot * Shape::slot_bytes; }

    __device__ void init() const {  // by one thread
        constexpr int consumer_warps = C::consumers * 4;
        for (int i = 0; i < C::stages; ++i) {
            barrier_init(x_full(i), 1);
            barrier_init(x_empty(i), consumer_warps);
        }
        for (int i = 0; i < C::weight_slots; ++i) {
            barrier_init(weight_full(i), 1);
            barrier_init(weight_empty(i), 32 * consumer_warps);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(tokens_full(i), 1);
            barrier_init(tokens_empty(i), 32 * consumer_warps);
        }
        barrier_init_fence();
    }

    __device__ void init_together() const {  // by all threads of the block
        if (threadIdx.x == 0) init();
        __syncthreads();
    }

    // Where this warp's results are on their way out
    __device__ unsigned out() const { return base + Shape::out_offset + threadIdx.x / 32 * out_bytes; }

    // A thread has read what it wants of a slot, or of the tokens' data.
    __device__ void release_weight(int slot) const { barrier_arrive(weight_empty(slot)); }
    __device__ void release_tokens(int buffer) const { barrier_arrive(tokens_empty(buffer)); }

    // A warp's products have read a stage.
    __device__ void release_x(int stage, int lane) const {
        if (lane == 0) barrier_arrive(x_empty(stage));
    }
};

// Warpgroups take turns to start their products, in a ring, so that one makes its next operands while another multiplies;
// left to themselves, they would all do the same at the same time. The named barrier of a warpgroup brings it its turn.
template <class C> struct Turns {
    static constexpr bool any = C::consumers > 1 && C::tokens > 64;  // fewer are multiplied before a turn is passed
    const int mine = threadIdx.x / 128;

    __device__ void begin() const {
        if (any && mine == C::consumers - 1) pass();
    }
    __device__ void take() const {
        if (any) named_barrier(1 + mine, 256);
    }
    __device__ void pass() const {
        if (any) named_barrier_arrive(1 + (mine + 1 == C::consumers ? 0 : mine + 1), 256);
    }
    __device__ void end() const {
        if (mine == 0) take();
    }
};

// The tiles of y of this block, one after the other: first all rows of the first tokens. Those that would make a last round
// with few blocks are cut into parts of C::tail tokens, for more blocks; with tail 0, they are not.
template <class C, class Shape> struct Tiles {
    static constexpr int parts = C::tail ? C::tokens / (C::tail ? C::tail : 1) : 1;
    static_assert(C::tail == 0 || (C::tail % 16 == 0 && C::tokens % C::tail == 0));
    int index, row_blocks, whole, count;
    __device__ Tiles(int M, int N) : index(blockIdx.x), row_blocks(ceil_div(N, Shape::rows)) {
        const int tiles = row_blocks * ceil_div(M, C::tokens);
        whole = C::tail ? tiles / gridDim.x * gridDim.x : tiles;
        count = whole + (tiles - whole) * parts;
    }
    __device__ bool any() const { return index < count; }
    __device__ bool any_whole() const { return index < whole; }
    __device__ void advance() { index += gridDim.x; }
    __device__ int row_tile0() const { return tile() % row_blocks * Shape::row_tiles; }
    __device__ int token0() const { return tile() / row_blocks * C::tokens + part() * C::tail; }
    __device__ int tokens() const { return C::tail && !any_whole() ? C::tail : C::tokens; }

  private:
    __device__ int tile() const { return any_whole() ? index : whole + (index - whole) / parts; }
    __device__ int part() const { return any_whole() ? 0 : (index - whole) % parts; }
};

// x of `tokens` tokens: KB k-blocks from `x` on; `chunk_stride` bytes lie between chunks in global memory.
template <class C, class Shape>
__device__ inline void produce_x(const Shared<C, Shape>& shared, Place<C::stages>& place, const unsigned char* x,
                                 size_t chunk_stride, int tokens, int KB, int lane) {
    const int chunk_bytes = tokens * 16;
    for (int stage = 0; stage < KB * Shape::stages_per_block; ++stage) {
        const unsigned full = shared.x_full(place.index);
        barrier_wait<C::debug>(shared.x_empty(place.index), place.parity ^ 1);
        if (lane == 0) barrier_arrive_expecting(full, Shape::chunks_per_stage * chunk_bytes);
        __syncwarp();
        if (lane < Shape::chunks_per_stage) {
            bulk_copy(shared.x(place.index) + lane * chunk_bytes, x + lane * chunk_stride, chunk_bytes, full);
        }
        x += Shape::chunks_per_stage * chunk_stride;
        place.advance();
    }
}

template <class C, class Shape>
__device__ inline void produce_weights(const Shared<C, Shape>& shared, Place<C::weight_slots>& place, const uint4* weight,
                                       int row_tile, int N, int KB, int lane) {
    // Row tiles past the last one repeat it: their results are not stored.
    const int tile = min(row_tile + lane, ceil_div(N, 16) - 1);
    const uint4* from = weight + size_t(tile) * KB * C::planes * 32;
    for (int kb = 0; kb < KB; ++kb) {
        const unsigned full = shared.weight_full(place.index);
        barrier_wait<C::debug>(shared.weight_empty(place.index), place.parity ^ 1);
        if (lane == 0) barrier_arrive_expecting(full, Shape::slot_bytes);
        __syncwarp();
        if (lane < Shape::row_tiles) {
            bulk_copy(shared.weight(place.index) + lane * Shape::tile_bytes, from, Shape::tile_bytes, full);
        }
        from += C::planes * 32;
        place.advance();
    }
}

// scale, zero point and sum of `tokens` tokens, to shared memory
template <class C, class Shape>
__device__ inline void produce_token_data(const Shared<C, Shape>& shared, const Place<2>& place, const float* scale,
                                          const int* zero, const int* sum, int token0, int tokens) {
    const int bytes = tokens * 4;
    const unsigned to = shared.token_data(place.index), full = shared.tokens_full(place.index);
    barrier_wait<C::debug>(shared.tokens_empty(place.index), place.parity ^ 1);
    barrier_arrive_expecting(full, Shape::token_words * bytes);
    bulk_copy(to, scale + token0, bytes, full);
    bulk_copy(to + bytes, zero + token0, bytes, full);
    if constexpr (Shape::token_words > 2) bulk_copy(to + 2 * bytes, sum + token0, bytes, full);
}

// All that the producing warpgroup does
template <class C, class Shape>
__device__ inline void produce(const Shared<C, Shape>& shared, Tiles<C, Shape> tiles, const uint4* weight,
                               const unsigned char* x, const float* x_scale, const int* x_zero, const int* x_sum, int N, int KB,
                               int MT) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    if constexpr (Shape::deals_registers) registers_lower<Shape::producer_registers>();
    if constexpr (C::programmatic) grid_dependency_launch();
    if (warp == 0) {
        if constexpr (C::programmatic) grid_dependency_wait();
        for (Place<C::stages> place; tiles.any(); tiles.advance()) {
            const unsigned char* from = x + size_t(tiles.token0()) * 16;
            produce_x(shared, place, from, size_t(MT) * 128, tiles.tokens(), KB, lane);
        }
    } else if (warp == 1) {
        for (Place<C::weight_slots> place; tiles.any(); tiles.advance())
            produce_weights(shared, place, weight, tiles.row_tile0(), N, KB, lane);
    } else if (Shape::token_words > 0 && warp == 2 && lane == 0) {
        if constexpr (C::programmatic) grid_dependency_wait();
        for (Place<2> place; tiles.any(); tiles.advance(), place.advance())
            produce_token_data(shared, place, x_scale, x_zero, x_sum, tiles.token0(), tiles.tokens());
    }
}

// ------------------------------------------------------------------------------------------------------------ results

__device__ inline int2 load_shared_2(unsigned address) {
    int2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address));
    return value;
}
__device__ inline uint4 load_shared_4(unsigned address) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    return value;
}

template <class T> __device__ inline unsigned pair(float low, float high) {
    return unsigned(from_float<T>(low).bits) | unsigned(from_float<T>(high).bits) << 16;
}

// The results of a warp's 16 rows lie in shared memory as [token][16 rows]. A lane holds, for n = lane / 4 and m = 2 (lane % 4),
// y[m][n], y[m+1][n], y[m][n+8], y[m+1][n+8]. `at` is where token 0 of these eight begins.
template <class T> __device__ inline void store_out(unsigned at, int lane, const float (&y)[4]) {
    if constexpr (sizeof(T) == 2) {
        const unsigned row = at + lane % 8 * out_pitch<T> + (lane & 8 ? 16 : 0);
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(row),
                     "r"(pair<T>(y[0], y[1])), "r"(pair<T>(y[2], y[3]))
                     : "memory");
    } else {
        const unsigned to = at + lane % 4 * 2 * out_pitch<T> + lane / 4 * 4;
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(y[0]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + out_pitch<T>), "f"(y[1]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + 32), "f"(y[2]) : "memory");
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(to + out_pitch<T> + 32), "f"(y[3]) : "memory");
    }
}

// The first `count` of 16 bytes of results, one by one
template <class T> __device__ inline void store_some(uint4 value, T* to, int count) {
    constexpr int width = 16 / sizeof(T), bits = 8 * sizeof(T);
#pragma unroll 1
    for (int i = 0; i < min(count, width); ++i) {
        if constexpr (sizeof(T) == 2) {
            to[i].bits = (unsigned short)(value.x);
        } else {
            to[i] = __uint_as_float(value.x);
        }
        value.x = __funnelshift_rc(value.x, value.y, bits), value.y = __funnelshift_rc(value.y, value.z, bits);
        value.z = __funnelshift_rc(value.z, value.w, bits), value.w = __funnelshift_rc(value.w, 0, bits);
    }
}

// Writes 16 rows, from n0 on, of a warp's results: value(j, y) gives those that this lane has of tokens 8j .. 8j+7. They go by
// the warp's `out` in shared memory, a few tokens at a time; no other warp is waited for. The lanes of a token write whole
// sectors of 32 bytes.
template <int tokens, class T, class Value>
__device__ __forceinline__ void write_out(unsigned out, T* y, int token0, int n0, int M, int N, Value value) {
    constexpr int width = 16 / sizeof(T), parts = 16 / width;  // rows of a lane; lanes of a token
    static_assert(32 / parts == out_tokens<T> && tokens % out_tokens<T> == 0);
    const int lane = threadIdx.x % 32, m = token0 + lane / parts, n = n0 + lane % parts * width;
    const int left = n < N ? M - m : 0;   // tokens from m on
    const bool aligned = N % width == 0;  // then n < N stands for all rows of the lane
    T* to = y + size_t(m) * N + n;
    uint4 leaving;
    auto store = [&](int first) {
        if (first < left) {
            if (aligned) {
                *reinterpret_cast<uint4*>(to) = leaving;
            } else {
                store_some(leaving, to, N - n);
            }
        }
        to += size_t(out_tokens<T>) * N;
    };
    __syncwarp();  // what was written before has left
#pragma unroll
    for (int first = 0; first < tokens; first += out_tokens<T>) {
        const unsigned buffer = out + first / out_tokens<T> % 2 * (out_bytes / 2);
#pragma unroll
        for (int i = 0; i < out_tokens<T>; i += 8) {
            float results[4];
            value((first + i) / 8, results);
            store_out<T>(buffer + i * out_pitch<T>, lane, results);
        }
        if (first > 0) store(first - out_tokens<T>);
        __syncwarp();
        leaving = load_shared_4(buffer + lane / parts * out_pitch<T> + lane % parts * 16);
    }
    store(tokens - out_tokens<T>);
}

// Per channel: what is known of one row n, and the result for one token
struct Row {
    float scale, bias;
    int minus_zero, minus_centered_sum;
    __device__ Row(int n, const float* w_scale, const int* w_zero, const int* w_centered_sum, const float* b, int N) {
        const int last = min(n, N - 1);
        scale = __ldg(w_scale + last), minus_zero = -__ldg(w_zero + last), minus_centered_sum = -__ldg(w_centered_sum + last);
        asm volatile("" : "+r"(minus_zero), "+r"(minus_centered_sum));  // or it would negate them for every token
        bias = b ? __ldg(b + last) : -0.0f;                             // y + -0 = y
    }
    // As `output_per_channel`, in two multiply-adds
    __device__ float result(int product, float x_scale, int x_zero, int x_sum) const {
        const unsigned sum = unsigned(product) + unsigned(minus_zero) * unsigned(x_sum);
        const unsigned value = sum + unsigned(minus_centered_sum) * unsigned(x_zero);
        return __fadd_rn(__fmul_rn(__fmul_rn(float(int(value)), scale), x_scale), bias);
    }
};

// Scales, zero points and sums of two of a tile's tokens. `token_data`: where the first one's scale lies
template <int tokens> struct TokenPair {
    int2 scale, zero, sum;
    __device__ explicit TokenPair(unsigned token_data)
        : scale(load_shared_2(token_data)),
          zero(load_shared_2(token_data + tokens * 4)),
          sum(load_shared_2(token_data + tokens * 8)) {}
};

// Per channel: results for rows n, n + 8 and two tokens from their products
template <int tokens>
__device__ inline void per_channel(float (&y)[4], const int (&products)[4], const Row (&rows)[2],
                                   const TokenPair<tokens>& pair) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        y[i] = rows[i / 2].result(products[i], __int_as_float(i % 2 ? pair.scale.y : pair.scale.x),
                                  i % 2 ? pair.zero.y : pair.zero.x, i % 2 ? pair.sum.y : pair.sum.x);
    }
}
