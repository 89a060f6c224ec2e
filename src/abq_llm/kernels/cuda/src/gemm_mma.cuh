// Integer product y^T = W x^T of bit-plane weights and 8-bit activations, for every GPU from sm_80 on.
//
// A warp owns `row_tiles` tiles of 16 rows of W and all `tokens` of the block. Of every block of 256 columns it takes
//
//     weights   global -> shared -> registers -> bytes (int8.cuh) -> operand A     every lane copies and reads back its own 16 bytes:
//                                                                                  shared memory is only a deep queue, no one else waits
//     tokens    global -> shared -> ldmatrix -> operand B                          shared by the `warps_rows` warps of a slice
//
// in a queue of `stages` column blocks. `warps_k` slices of `warps_rows` warps divide the columns; their sums meet in shared memory and
// are added in a fixed order, so that results repeat to the bit.
//
// Grouped weights: the integer sum of a group becomes a float and is scaled at the end of the group. Slices begin with a group. A single
// slice adds the groups in the reference's order and with its roundings, to the same bits; several have the zero points of the tokens
// corrected once, at the end, which needs fewer tables.
//
// Constants: planes, tokens, warps_rows, row_tiles, warps_k, stages, grouped, group_words (group size / 32),
// has_zero_point (grouped weights only), programmatic, shared_bytes, blocks_per_sm; type T of the output.
#pragma once

#include "common.cuh"
#include "epilogue.cuh"
#include "int8.cuh"

__device__ constexpr int larger(int a, int b) { return a > b ? a : b; }
__device__ constexpr int smaller(int a, int b) { return a < b ? a : b; }
// Four 8x16-byte tiles (two if `b` has two registers), each from eight 16-byte rows whose addresses lanes 8i.. 8i+7 give
__device__ inline void load_matrices(unsigned (&b)[4], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void load_matrices(unsigned (&b)[2], unsigned address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(b[0]), "=r"(b[1]) : "r"(address) : "memory");
}

// Like `mma_u8`, but the sum begins at `start` in place of what `d` held
__device__ inline void mma_u8_from(int start, int (&d)[4], const unsigned (&a)[4], uint2 b) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(start));
}

__device__ inline void copy_async_4(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
__device__ inline void copy_async_16_or_zero(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(inside ? 16 : 0)
                 : "memory");
}

// Barrier `index` (1..15) of `threads` threads of the block
template <int threads> __device__ inline void partial_barrier(int index) {
    if constexpr (threads == 32)
        __syncwarp();
    else
        asm volatile("bar.sync %0, %1;" ::"r"(index), "n"(threads) : "memory");
}

// Sums of one thread: integers per channel, floats if grouped
template <bool grouped> struct SumType {
    using type = int;
};
template <> struct SumType<true> {
    using type = float;
};

template <class C> struct GemmMma {
    using Sum = typename SumType<C::grouped>::type;
    static constexpr int token_tiles = C::tokens / 8;
    static constexpr int block_row_tiles = C::warps_rows * C::row_tiles;
    static constexpr int rows = 16 * block_row_tiles;
    static constexpr int slice_threads = 32 * C::warps_rows;
    static constexpr int threads = slice_threads * C::warps_k;

    // Groups of 32 * group_words columns against blocks of 8 words
    static constexpr bool groups_fit_blocks = 8 % C::group_words == 0;
    static constexpr bool in_order = C::grouped && C::warps_k == 1;
    static constexpr int ends_apart = greatest_common_divisor(C::group_words, 8);      // a group ends at multiples of this only
    static constexpr int slice_unit = C::grouped ? C::group_words / ends_apart : 1;  // blocks after which both end

    // Blocks whose weights are under way before there are tokens. Few tokens wait for memory: the last stage is filled too, though its
    // tokens follow in the loop. Many wait for tensor cores and have no registers to spare.
    static constexpr int early_weights = C::tokens <= 32 ? C::stages : C::stages - 1;

    // A sum of less than 2^23 that begins at the bits of the float 2^23 is the float 2^23 + sum: no conversion needed
    static constexpr bool sums_in_mantissa =
        C::grouped && C::group_words < 1024 && ((1 << C::planes) - 1) * 255 * 32ll * C::group_words < (1 << 23);
    static constexpr int sum_start = sums_in_mantissa ? 0x4B000000 : 0;

    // Shared memory: `stages` per slice; then, in the same place, the slices' sums [slice][token][row]; then what the epilogue needs
    static constexpr int group_slots = C::grouped ? groups_in_block(C::group_words) : 0;
    static constexpr int zero_slots = C::grouped && C::has_zero_point ? group_slots : 0;
    static constexpr int tokens_offset = 0;                                                        // u8 [16 chunks][tile][8][16]
    static constexpr int weight_offset = tokens_offset + 256 * C::tokens;                          // uint4 [row tile][plane][lane]
    static constexpr int scale_offset = weight_offset + 512 * C::planes * block_row_tiles;         // float [group][row]
    static constexpr int total_offset = scale_offset + 4 * group_slots * rows;                     // int [group][row]
    static constexpr int group_sum_offset = total_offset + (in_order ? 4 * group_slots * rows : 0); // int [group][token]
    static constexpr int x_zero_offset = group_sum_offset + 4 * zero_slots * C::tokens;            // int [token]
    static constexpr int zero_offset = x_zero_offset + (in_order ? 4 * C::tokens : 0);            // u8 [group][row]
    static constexpr int stage_bytes = zero_offset + zero_slots * rows;
    static constexpr int sum_pitch = rows + 4;  // four lanes two tokens apart, eight lanes a row apart: 32 banks
    static constexpr int queue_bytes = larger(C::warps_k * C::stages * stage_bytes, C::warps_k * C::tokens * sum_pitch * 4);
    static constexpr int shared_bytes = queue_bytes + 16 * rows + 12 * C::tokens;

    static_assert(C::shared_bytes == shared_bytes, "the host's sum of shared memory differs");
    static_assert(C::stages >= 2 && C::warps_k <= 15 && threads <= 1024 && slice_threads <= 16 * C::tokens, "tile");
    static_assert(C::tokens >= 8 && C::tokens <= 128 && (C::tokens & (C::tokens - 1)) == 0 && (C::warps_rows & (C::warps_rows - 1)) == 0,
                  "tokens and warps_rows are powers of two");
    static_assert(threads % (rows / 8) == 0, "a thread keeps its rows through the epilogue");
};

__device__ inline float float_below_2_23(unsigned value) { return __uint_as_float(0x4B000000u | value) - 8388608.0f; }

// End of a group: y += scale * (sum - zero * group_sum - x_zero * total), the last term in order only. `row` and `token` are the lane's
// first ones in the block.
template <class C>
__device__ inline void add_group(
    float (&y)[C::row_tiles][C::tokens / 8][4], int (&sum)[C::row_tiles][C::tokens / 8][4], const unsigned char* stage,
    int slot, int row, int token) {
    using G = GemmMma<C>;
    const float* scales = reinterpret_cast<const float*>(stage + G::scale_offset) + slot * G::rows + row;
    const int* totals = reinterpret_cast<const int*>(stage + G::total_offset) + slot * G::rows + row;
    const unsigned char* zeros = stage + G::zero_offset + slot * G::rows + row;
    const int* group_sums = reinterpret_cast<const int*>(stage + G::group_sum_offset) + slot * C::tokens + token;
    const int* x_zeros = reinterpret_cast<const int*>(stage + G::x_zero_offset) + token;
    float scale[C::row_tiles][2];
    int total[C::row_tiles][2] = {}, zero[C::row_tiles][2] = {};
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            scale[r][half] = scales[16 * r + 8 * half];
            if constexpr (G::in_order) total[r][half] = totals[16 * r + 8 * half];
            if constexpr (C::has_zero_point) zero[r][half] = zeros[16 * r + 8 * half];
        }
#pragma unroll
    for (int n = 0; n < C::tokens / 8; n++) {
        int2 x_zero = make_int2(0, 0), group_sum = make_int2(0, 0);
        if constexpr (G::in_order) x_zero = *reinterpret_cast<const int2*>(x_zeros + 8 * n);
        if constexpr (C::has_zero_point) group_sum = *reinterpret_cast<const int2*>(group_sums + 8 * n);
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int z = i % 2 ? x_zero.y : x_zero.x, s = i % 2 ? group_sum.y : group_sum.x;
                float term = 0;
                if constexpr (G::sums_in_mantissa) {  // 2^23 + integers below 2^23: exact, until the last rounds once
                    float value = __int_as_float(sum[r][n][i]);
                    if constexpr (C::has_zero_point)
                        value = __fmaf_rn(-float_below_2_23(zero[r][i / 2]), float_below_2_23(s), value);
                    if constexpr (G::in_order) value = __fmaf_rn(-float_below_2_23(z), float(total[r][i / 2]), value);
                    term = __fmaf_rn(value, scale[r][i / 2], -8388608.0f * scale[r][i / 2]);
                } else {
                    const int value = sum[r][n][i] - zero[r][i / 2] * s - z * total[r][i / 2];
                    term = __fmul_rn(float(value), scale[r][i / 2]);
                }
                y[r][n][i] = __fadd_rn(y[r][n][i], term);
                if constexpr (!G::groups_fit_blocks) sum[r][n][i] = G::sum_start;
            }
    }
}

// One block of 256 columns of one warp. `last`: nothing follows, an open group ends here.
template <class C>
__device__ inline void multiply_block(
    int (&sum)[C::row_tiles][C::tokens / 8][4], float (&total)[C::row_tiles][C::tokens / 8][4], const unsigned char* stage,
    int warp_row, int lane, int kb, bool last) {
    using G = GemmMma<C>;
    constexpr int words = power_of_two_above(C::planes);
    unsigned word[C::row_tiles][4][words];
    const uint4* weight = reinterpret_cast<const uint4*>(stage + G::weight_offset) + warp_row * C::row_tiles * C::planes * 32 + lane;
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++) load_planes<C::planes>(word[r], weight + r * C::planes * 32);

    // Matrices of one ldmatrix: the two chunks of a step for one token tile, then for its neighbour
    constexpr int tiles = smaller(2, G::token_tiles);
    unsigned matrix = shared_address(stage) + ((lane / 8 % 2) * G::token_tiles + lane / 16 % tiles) * 128 + lane % 8 * 16;
    const int group_offset = C::grouped ? 8 * kb % C::group_words : 0;
    const int first_row = warp_row * C::row_tiles * 16 + lane / 4, first_token = lane % 4 * 2;
#pragma unroll
    for (int step = 0; step < 8; step++) {
        unsigned a[C::row_tiles][4];
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int i = 0; i < 4; i++) a[r][i] = codes_of_step(word[r][i], step);
#pragma unroll
        for (int n = 0; n < G::token_tiles; n += tiles) {
            unsigned b[2 * tiles];
            load_matrices(b, matrix + (2 * step * G::token_tiles + n) * 128);
#pragma unroll
            for (int tile = 0; tile < tiles; tile++)
#pragma unroll
                for (int r = 0; r < C::row_tiles; r++)
                    if (C::grouped && G::groups_fit_blocks && step % C::group_words == 0)
                        mma_u8_from(G::sum_start, sum[r][n + tile], a[r], make_uint2(b[2 * tile], b[2 * tile + 1]));
                    else
                        mma_u8(sum[r][n + tile], a[r], make_uint2(b[2 * tile], b[2 * tile + 1]));
        }
        if constexpr (C::grouped)
            if ((step + 1) % G::ends_apart == 0 &&
                (G::groups_fit_blocks || (group_offset + step + 1) % C::group_words == 0 || (step == 7 && last)))
                add_group<C>(total, sum, stage, (group_offset + step) / C::group_words, first_row, first_token);
    }
}

// per channel: w_scale [N], w_zero int [N], w_sum int [N] (centered_sum), x_sum [8 MT].
// grouped: w_scale [groups][N], w_zero unsigned char [groups][N], x_sum [groups][8 MT], w_sum int [groups][N] in order (group_total),
// else float [N] (offset); without zero points
// w_zero and x_sum are null. N is padded to 16 in all of them, MT is that of ACT_U8.
template <class C>
__global__ void __launch_bounds__(GemmMma<C>::threads, C::blocks_per_sm) gemm_mma(
    const uint4* weight, const unsigned char* x, const float* w_scale, const void* w_zero, const void* w_sum, const float* x_scale,
    const int* x_zero, const int* x_sum, const float* bias, typename C::T* y, int M, int N, int KB, int MT, int groups) {
    using G = GemmMma<C>;
    using Sum = typename G::Sum;
    extern __shared__ uint4 shared_memory[];
    unsigned char* shared = reinterpret_cast<unsigned char*>(shared_memory);
    const int thread = threadIdx.x, lane = thread % 32, slice = thread / G::slice_threads, slice_thread = thread % G::slice_threads;
    const int warp_row = slice_thread / 32;
    const int first_tile = blockIdx.x * G::token_tiles, first_token = 8 * first_tile;
    const int first_row = blockIdx.y * G::rows, padded_rows = ceil_div(N, 16) * 16;
    const int column_tokens = 8 * MT;

    // This slice's blocks of columns
    const int units = ceil_div(KB, G::slice_unit);
    const int kb_begin = smaller(KB, units * slice / C::warps_k * G::slice_unit);
    const int kb_end = smaller(KB, units * (slice + 1) / C::warps_k * G::slice_unit);

    unsigned char* queue = shared + slice * C::stages * G::stage_bytes;
    float* row_scale = reinterpret_cast<float*>(shared + G::queue_bytes);
    int* row_zero = reinterpret_cast<int*>(row_scale + G::rows);
    int* row_sum = row_zero + G::rows;
    float* row_bias = reinterpret_cast<float*>(row_sum + G::rows);
    float* token_scale = row_bias + G::rows;
    int* token_zero = reinterpret_cast<int*>(token_scale + C::tokens);
    int* token_sum = token_zero + C::tokens;

    // The loads of a slice go from block to block of columns, and their addresses with them
    const uint4* weight_source[C::row_tiles];
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++) {
        int tile = smaller(blockIdx.y * G::block_row_tiles + warp_row * C::row_tiles + r, padded_rows / 16 - 1);
        weight_source[r] = weight + ((long long)(tile)*KB + kb_begin) * (C::planes * 32) + lane;
    }
    auto load_weights = [&](int kb, unsigned char* stage) {
        uint4* target = reinterpret_cast<uint4*>(stage + G::weight_offset) + warp_row * C::row_tiles * C::planes * 32 + lane;
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++) {
#pragma unroll
            for (int p = 0; p < C::planes; p++) copy_async_16(target + (r * C::planes + p) * 32, weight_source[r] + p * 32);
            weight_source[r] += C::planes * 32;
        }
        if constexpr (C::grouped) {
            const int first_group = 8 * kb / C::group_words;
#pragma unroll
            for (int piece = slice_thread; piece < G::group_slots * G::rows / 4; piece += G::slice_threads) {
                int group = first_group + piece / (G::rows / 4), row = first_row + piece % (G::rows / 4) * 4;
                const long long place = (long long)(group)*padded_rows + row;
                const bool inside = group < groups && row < padded_rows;
                copy_async_16_or_zero(stage + G::scale_offset + 16 * piece, w_scale + place, inside);
                if constexpr (G::in_order)
                    copy_async_16_or_zero(stage + G::total_offset + 16 * piece, static_cast<const int*>(w_sum) + place, inside);
            }
        }
        if constexpr (G::zero_slots > 0) {
            const unsigned char* zeros = static_cast<const unsigned char*>(w_zero);
#pragma unroll
            for (int piece = slice_thread; piece < G::zero_slots * G::rows / 16; piece += G::slice_threads) {
                int group = 8 * kb / C::group_words + piece / (G::rows / 16), row = first_row + piece % (G::rows / 16) * 16;
                copy_async_16_or_zero(stage + G::zero_offset + 16 * piece, zeros + (long long)(group)*padded_rows + row,
                                      group < groups && row < padded_rows);
            }
        }
    };
    // A chunk of 16 columns is C::tokens pieces of 16 bytes. Tiles without a token repeat the first one: no branches, and no one looks.
    constexpr int chunks_at_once = larger(1, G::slice_threads / C::tokens), copies_per_chunk = larger(1, C::tokens / G::slice_threads);
    const int piece = slice_thread % C::tokens, chunk = slice_thread / C::tokens;
    const int used_pieces = 8 * (ceil_div(M, 8) - first_tile);
    const long long chunk_bytes = 128ll * MT;
    const unsigned char* token_source = x + (16ll * kb_begin + chunk) * chunk_bytes + first_tile * 128;
    int piece_offset[copies_per_chunk];
#pragma unroll
    for (int i = 0; i < copies_per_chunk; i++) {
        int source_piece = piece + i * G::slice_threads;
        piece_offset[i] = 16 * (source_piece < used_pieces ? source_piece : source_piece % 8);
    }
    auto load_tokens = [&](int kb, unsigned char* stage) {
        unsigned char* target = stage + G::tokens_offset + (chunk * C::tokens + piece) * 16;
#pragma unroll
        for (int c = 0; c < 16; c += chunks_at_once) {
#pragma unroll
            for (int i = 0; i < copies_per_chunk; i++)
                copy_async_16(target + (c * C::tokens + i * G::slice_threads) * 16, token_source + piece_offset[i]);
            token_source += chunks_at_once * chunk_bytes;
        }
        if constexpr (G::in_order) {
            if (slice_thread < C::tokens / 4) {
                const int token = first_token + slice_thread * 4;
                copy_async_16_or_zero(stage + G::x_zero_offset + 16 * slice_thread, x_zero + token, token < column_tokens);
            }
        }
        if constexpr (G::zero_slots > 0) {
#pragma unroll
            for (int four = slice_thread; four < G::zero_slots * C::tokens / 4; four += G::slice_threads) {
                int group = 8 * kb / C::group_words + four / (C::tokens / 4), token = first_token + four % (C::tokens / 4) * 4;
                copy_async_16_or_zero(stage + G::group_sum_offset + 16 * four, x_sum + (long long)(group)*column_tokens + token,
                                      group < groups && token < column_tokens);
            }
        }
    };

    // Weights are always there, tokens only after the previous kernel
#pragma unroll
    for (int stage = 0; stage < G::early_weights; stage++)
        if (kb_begin + stage < kb_end) load_weights(kb_begin + stage, queue + stage * G::stage_bytes);
    for (int row = thread; row < G::rows && first_row + row < N; row += G::threads) {
        if constexpr (!C::grouped) {
            copy_async_4(row_scale + row, w_scale + first_row + row);
            copy_async_4(row_zero + row, static_cast<const int*>(w_zero) + first_row + row);
        }
        if constexpr (!G::in_order) copy_async_4(row_sum + row, static_cast<const int*>(w_sum) + first_row + row);
        if (bias) copy_async_4(row_bias + row, bias + first_row + row);
    }
    if constexpr (C::programmatic) {
        grid_dependency_launch();
        grid_dependency_wait();
    }
    for (int token = thread; token < C::tokens && first_token + token < M; token += G::threads) {
        copy_async_4(token_scale + token, x_scale + first_token + token);
        if constexpr (!G::in_order) copy_async_4(token_zero + token, x_zero + first_token + token);
        if constexpr (!C::grouped) copy_async_4(token_sum + token, x_sum + first_token + token);
    }
#pragma unroll
    for (int stage = 0; stage < C::stages - 1; stage++) {
        if (kb_begin + stage < kb_end) load_tokens(kb_begin + stage, queue + stage * G::stage_bytes);
        copy_async_commit();
    }

    int sum[C::row_tiles][G::token_tiles][4];
    float total[C::row_tiles][G::token_tiles][4] = {};
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) sum[r][n][i] = G::sum_start;

    int stage = 0;
    for (int kb = kb_begin; kb < kb_end; kb++) {
        copy_async_wait<C::stages - 2>();
        partial_barrier<G::slice_threads>(1 + slice);  // the stage is complete, and no one reads the one before it any more
        if (int next = kb + C::stages - 1; next < kb_end) {
            unsigned char* free_stage = queue + (stage == 0 ? C::stages - 1 : stage - 1) * G::stage_bytes;
            if (G::early_weights < C::stages || kb > kb_begin) load_weights(next, free_stage);
            load_tokens(next, free_stage);
        }
        copy_async_commit();
        multiply_block<C>(sum, total, queue + stage * G::stage_bytes, warp_row, lane, kb, kb == KB - 1);
        stage = stage == C::stages - 1 ? 0 : stage + 1;
    }

    // Sums change places: a lane holds rows g, g + 8 of tokens 2t, 2t + 1, the output wants neighbouring rows of one token
    copy_async_wait<0>();
    __syncthreads();
    Sum* sums = reinterpret_cast<Sum*>(shared);
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int row = (warp_row * C::row_tiles + r) * 16 + i / 2 * 8 + lane / 4, token = n * 8 + lane % 4 * 2 + i % 2;
                Sum* place = sums + (slice * C::tokens + token) * G::sum_pitch + row;
                if constexpr (C::grouped)
                    *place = total[r][n][i];
                else
                    *place = sum[r][n][i];
            }
    __syncthreads();

    constexpr int row_octets = G::rows / 8;
    const int row = thread % row_octets * 8;
    auto add_8 = [](Sum(&value)[8], const Sum* address) {
        const uint4* vector = reinterpret_cast<const uint4*>(address);
        uint4 low = vector[0], high = vector[1];
        const unsigned bits[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
        for (int i = 0; i < 8; i++)
            if constexpr (C::grouped)
                value[i] += __uint_as_float(bits[i]);
            else
                value[i] += int(bits[i]);
    };

    const int columns = N - (first_row + row);
    for (int token = thread / row_octets; columns > 0 && token < C::tokens && first_token + token < M; token += G::threads / row_octets) {
        Sum value[8] = {};
#pragma unroll
        for (int s = 0; s < C::warps_k; s++) add_8(value, sums + (s * C::tokens + token) * G::sum_pitch + row);
        float output[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if constexpr (G::in_order)
                output[i] = __fmul_rn(value[i], token_scale[token]);
            else if constexpr (C::grouped)
                output[i] = output_grouped(value[i], __int_as_float(row_sum[row + i]), token_zero[token], token_scale[token]);
            else
                output[i] = output_per_channel(value[i], row_zero[row + i], row_sum[row + i], row_scale[row + i], token_zero[token],
                                               token_sum[token], token_scale[token]);
            if (bias) output[i] = __fadd_rn(output[i], row_bias[row + i]);
        }
        store_8(y + (long long)(first_token + token) * N + first_row + row, output, columns);
    }
}
