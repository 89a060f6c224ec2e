// y[M, N] = x[M, K] w[N, K]^T for few tokens, on `mma.sync` of 16-bit floats, for every GPU from sm_80 on: weights as
// bit-planes, x in fp16 or bf16 as it is.
//
// A block does some neighbouring row tiles (of 16 rows) and all k-blocks (of 256 columns), `C::warps_k` k-blocks a stage of its queue:
//
//     k-block            0   1  |  2   3  |  4 ...        warp w_rk: row tiles r * C::row_tiles .. of the block, and slice k of
//     row tile 0        w00 w01 | w00 w01 | w00           the columns. The sums of the slices meet in shared memory and are
//     row tile 1        w10 w11 | w10 w11 | w10           added in a fixed order, so that results repeat to the bit.
//     ...
//     tokens            x       | x       | x             in shared memory, for all warps
//
// Planes become codes in bytes (int8.cuh), codes become q - z in floats, exactly, and the sums of a group are scaled in fp32: the
// weight is never rounded. A lane has four neighbouring columns of the weight in a word, columns 4t .. 4t+3 of 16; the product
// wants 2t, 2t+1, 2t+8, 2t+9 of it. The order of columns is free as long as both have the same: so has x, by loads of four
// neighbours.
//
// From sm_90 on two warps more fill the queue by the copy engine: one copies weights, as `decode_queue.cuh` does, and the other
// x, which alone has to wait for the kernel before. Elsewhere all warps copy.
//
//   C::tokens       of a block; 8 n, or 1, 2, 4
//   C::window       stages of weights under way before any has come
//   C::early        the next kernel may start, and read its weights, before x is here
//   C::full_blocks  k-blocks have no columns but those of x
#pragma once
#include "bulk.cuh"
#include "epilogue.cuh"
#include "int8.cuh"
#include "pairs.cuh"

__device__ inline void mma_floats(half_t, float (&d)[4], const unsigned (&a)[4], uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
__device__ inline void mma_floats(bf16_t, float (&d)[4], const unsigned (&a)[4], uint2 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

template <class C> struct MmaF16 {
    static constexpr int warps = C::warps_rows * C::warps_k;
    static constexpr int threads = 32 * (warps + 2 * has_bulk_copies);
    static constexpr int row_tiles = C::warps_rows * C::row_tiles, rows = 16 * row_tiles;
    static constexpr int token_tiles = ceil_div(C::tokens, 8);
    static constexpr int chains = C::row_tiles * token_tiles == 1 ? 2 : 1;  // of products that wait for each other

    // A stage: planes [row tile][slice][plane][lane] | scales fp32 [slice][slot][row] | zero points u8 [slice][slot][row]
    // | x [token][column], with 32 bytes more a token, against bank conflicts. A slot is a group that meets the k-block.
    static constexpr int slots = C::grouped ? groups_in_block(C::group_words) : 0;
    static constexpr int plane_bytes = 512 * C::planes;
    static constexpr int scale_offset = row_tiles * C::warps_k * plane_bytes;
    static constexpr int zero_offset = scale_offset + C::warps_k * slots * rows * 4;
    static constexpr int x_offset = zero_offset + C::warps_k * slots * rows;
    static constexpr int x_pitch = C::warps_k * 512 + 32;
    static constexpr int stage_bytes = x_offset + C::tokens * x_pitch;

    // After the last stage, in the same place, sums fp32 [slice][token][row]; behind the queue, scale and bias of the rows
    static constexpr int sum_pitch = rows + 4;
    static constexpr int sum_bytes = C::warps_k * C::tokens * sum_pitch * 4, queue_bytes = C::stages * stage_bytes;
    static constexpr int shared_bytes = (sum_bytes > queue_bytes ? sum_bytes : queue_bytes) + 8 * rows;
    static_assert(C::shared_bytes == shared_bytes, "the host must ask for as much shared memory");
};

// What a block copies of global memory
template <class C> struct MmaF16Source {
    using G = MmaF16<C>;
    const unsigned char *weight, *x;
    const float* scale;
    const unsigned char* zero;
    int K, k_blocks, groups, padded_rows, first_tile, tiles, first_token, tokens;

    __device__ int slices(int kb) const { return min(C::warps_k, k_blocks - kb); }
    __device__ int weight_bytes(int kb) const { return slices(kb) * tiles * (G::plane_bytes + 80 * G::slots); }
    __device__ int token_bytes(int kb) const { return min(C::warps_k * 256, K - kb * 256) * 2; }

    // The pieces of a stage from k-block kb on, those that are worker's: `copy(to, from, bytes)`
    template <class Copy> __device__ void copy_weights(unsigned char* stage, int kb, int worker, int workers, Copy copy) const {
        for (int i = worker; i < tiles; i += workers) {
            copy(stage + i * C::warps_k * G::plane_bytes, weight + ((long long)(first_tile + i) * k_blocks + kb) * G::plane_bytes,
                 slices(kb) * G::plane_bytes);
        }
        if constexpr (C::grouped) {
            for (int i = worker; i < slices(kb) * G::slots; i += workers) {
                const int group = min(8 * (kb + i / G::slots) / C::group_words + i % G::slots, groups - 1);
                const long long from = (long long)group * padded_rows + first_tile * 16;
                copy(stage + G::scale_offset + i * G::rows * 4, scale + from, tiles * 64);
                copy(stage + G::zero_offset + i * G::rows, zero + from, tiles * 16);
            }
        }
    }
    template <class Copy> __device__ void copy_tokens(unsigned char* stage, int kb, int worker, int workers, Copy copy) const {
        for (int i = worker; i < tokens; i += workers) {
            copy(stage + G::x_offset + i * G::x_pitch, x + ((long long)(first_token + i) * K + kb * 256) * 2, token_bytes(kb));
        }
    }
};

// The rows g, g + 8 of a lane: of each of its row tiles
template <class C> struct LaneRows {
    unsigned zero[C::row_tiles][2];
    float scale[C::row_tiles][2];
};

// One k-block of one warp; grouped, its sums end here, scaled, in `total`. `steps`: of 32 columns, that the k-block has.
template <class C>
__device__ inline void multiply_block(
    float (&sum)[MmaF16<C>::chains][C::row_tiles][MmaF16<C>::token_tiles][4],
    float (&total)[C::row_tiles][MmaF16<C>::token_tiles][4], LaneRows<C>& rows, const unsigned char* stage, int warp_row, int slice,
    int kb, int steps) {
    using G = MmaF16<C>;
    using T = typename C::T;
    using Codes = Centered<T, C::planes>;
    constexpr int byte_planes = C::planes < 8 ? C::planes : 8, words = power_of_two_above(byte_planes);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

    unsigned word[C::row_tiles][4][words], ninth[C::row_tiles][4] = {};
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++) {
        const int tile = warp_row * C::row_tiles + r;
        const uint4* planes = reinterpret_cast<const uint4*>(stage + (tile * C::warps_k + slice) * G::plane_bytes) + lane;
#pragma unroll
        for (int p = 0; p < words; p++) {
            const uint4 plane = p < byte_planes ? planes[p * 32] : make_uint4(0, 0, 0, 0);
            word[r][0][p] = plane.x, word[r][1][p] = plane.y, word[r][2][p] = plane.z, word[r][3][p] = plane.w;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) planes_to_steps<byte_planes>(word[r][i]);
        if constexpr (C::planes > 8) {
            const uint4 plane = planes[8 * 32];
            ninth[r][0] = plane.x, ninth[r][1] = plane.y, ninth[r][2] = plane.z, ninth[r][3] = plane.w;
        }
    }

    const unsigned char* tokens[G::token_tiles];
#pragma unroll
    for (int n = 0; n < G::token_tiles; n++) {
        const int token = C::tokens < 8 ? g % C::tokens : 8 * n + g;
        tokens[n] = stage + G::x_offset + token * G::x_pitch + slice * 512 + t * 8;
    }

    constexpr bool groups_fit = 8 % C::group_words == 0;
    constexpr int ends_apart = greatest_common_divisor(C::group_words, 8);  // a group ends at multiples of this only
    const int before = groups_fit ? 0 : 8 * kb % C::group_words;             // steps of the first group in k-blocks before
#pragma unroll
    for (int step = 0; step < 8; step++) {
        const int slot = (before + step) / C::group_words;
        if constexpr (C::grouped) {
            if (step % ends_apart == 0 && (step == 0 || (before + step) % C::group_words == 0)) {
                const int first = (slice * G::slots + slot) * G::rows + warp_row * C::row_tiles * 16 + g;
#pragma unroll
                for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int row = first + 16 * r + 8 * e;
                        rows.zero[r][e] = Codes::zero(stage[G::zero_offset + row]);
                        rows.scale[r][e] = reinterpret_cast<const float*>(stage + G::scale_offset)[row];
                    }
            }
        }
        if (C::full_blocks || step < steps) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                unsigned a[C::row_tiles][4];
#pragma unroll
                for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const unsigned codes = codes_of_step(word[r][2 * h + i % 2], step);
                        const unsigned last = ninth[r][2 * h + i % 2] >> step & 0x01010101u;
                        a[r][i] = Codes::pair(codes, last, i / 2, rows.zero[r][i % 2]);
                    }
#pragma unroll
                for (int n = 0; n < G::token_tiles; n++) {
                    const uint2 b = *reinterpret_cast<const uint2*>(tokens[n] + step * 64 + h * 32);
#pragma unroll
                    for (int r = 0; r < C::row_tiles; r++) mma_floats(T(), sum[h % G::chains][r][n], a[r], b);
                }
            }
        }
        if constexpr (C::grouped) {
            if ((step + 1) % ends_apart == 0 && (step == 7 || (before + step + 1) % C::group_words == 0)) {
#pragma unroll
                for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                    for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            float part = sum[0][r][n][i];
                            if constexpr (G::chains == 2) part += sum[1][r][n][i];
                            total[r][n][i] += rows.scale[r][i / 2] * part;
#pragma unroll
                            for (int chain = 0; chain < G::chains; chain++) sum[chain][r][n][i] = 0;
                        }
            }
        }
    }
}

// weight, w_scale, w_zero as of `layout.prepare`; x [M][K], K a multiple of 32 columns; bias fp32 [N] or null.
template <class C> __global__ void __launch_bounds__(MmaF16<C>::threads, C::resident) gemm_mma_f16(
    const unsigned char* weight, const unsigned char* x, const float* w_scale, const void* w_zero, const float* bias,
    typename C::T* y, int M, int N, int K, int k_blocks, int groups) {
    using G = MmaF16<C>;
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ unsigned long long barriers[3][C::stages];
    auto weights_full = [&](int stage) { return shared_address(&barriers[0][stage]); };
    auto tokens_full = [&](int stage) { return shared_address(&barriers[1][stage]); };
    auto empty = [&](int stage) { return shared_address(&barriers[2][stage]); };
    const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0);

    // Row tiles, shared out evenly: C::warps_rows * C::row_tiles a block, or fewer
    const int row_tiles = ceil_div(N, 16);
    const int first_tile = int((long long)blockIdx.y * row_tiles / gridDim.y);
    const int tiles = int((blockIdx.y + 1ll) * row_tiles / gridDim.y) - first_tile;
    const int first_row = first_tile * 16, first_token = blockIdx.x * C::tokens;
    const MmaF16Source<C> source{weight, x, w_scale, static_cast<const unsigned char*>(w_zero), K, k_blocks, groups,
                                 16 * row_tiles, first_tile, tiles, first_token, min(C::tokens, M - first_token)};

    if constexpr (has_bulk_copies) {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < C::stages; stage++) {
                barrier_init(weights_full(stage), 1);
                barrier_init(tokens_full(stage), 1);
                barrier_init(empty(stage), G::warps);
            }
            barrier_init_fence();
        }
        __syncthreads();
        if (warp == G::warps) {
            Place<C::stages> place;
            int step = 0;
            for (int kb = 0; kb < k_blocks; kb += C::warps_k, step++, place.advance()) {
                barrier_wait<false>(empty(place.index), place.parity ^ 1);
                if (step >= C::window && step < C::stages) barrier_wait<false>(weights_full(step - C::window), 0);
                const unsigned full = weights_full(place.index);
                if (lane == 0) barrier_arrive_expecting(full, source.weight_bytes(kb));
                __syncwarp();
                source.copy_weights(shared + place.index * G::stage_bytes, kb, lane, 32, [&](void* to, const void* from, int bytes) {
                    bulk_copy(shared_address(to), from, bytes, full);
                });
            }
            return;
        }
        if (warp == G::warps + 1) {
            if constexpr (C::early) grid_dependency_launch();
            grid_dependency_wait();
            if constexpr (!C::early) grid_dependency_launch();
            Place<C::stages> place;
            for (int kb = 0; kb < k_blocks; kb += C::warps_k, place.advance()) {
                barrier_wait<false>(empty(place.index), place.parity ^ 1);
                const unsigned full = tokens_full(place.index);
                if (lane == 0) barrier_arrive_expecting(full, source.tokens * source.token_bytes(kb));
                __syncwarp();
                source.copy_tokens(shared + place.index * G::stage_bytes, kb, lane, 32, [&](void* to, const void* from, int bytes) {
                    bulk_copy(shared_address(to), from, bytes, full);
                });
            }
            return;
        }
    }
    auto copy_stage = [&](int stage, int kb) {  // where there is no copy engine
        if (kb < k_blocks) {
            auto copy = [&](unsigned char* to, const void* from, int bytes) {
                for (int i = lane * 16; i < bytes; i += 512) copy_async_16(to + i, static_cast<const unsigned char*>(from) + i);
            };
            source.copy_weights(shared + stage * G::stage_bytes, kb, warp, G::warps, copy);
            source.copy_tokens(shared + stage * G::stage_bytes, kb, warp, G::warps, copy);
        }
        copy_async_commit();
    };
    if constexpr (!has_bulk_copies)
#pragma unroll
        for (int stage = 0; stage < C::stages - 1; stage++) copy_stage(stage, stage * C::warps_k);

    const int slice = warp % C::warps_k, warp_row = warp / C::warps_k;
    float* row_scale = reinterpret_cast<float*>(shared + G::shared_bytes - 8 * G::rows);
    float* row_bias = row_scale + G::rows;
    for (int row = threadIdx.x; row < G::rows; row += 32 * G::warps) {
        const int n = min(first_row + row, N - 1);
        row_scale[row] = C::grouped ? 1.0f : w_scale[n];
        row_bias[row] = bias ? bias[n] : -0.0f;  // y + -0 = y
    }
    LaneRows<C> rows;
    if constexpr (!C::grouped)
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = min(first_row + (warp_row * C::row_tiles + r) * 16, 16 * row_tiles - 16) + lane / 4 + 8 * e;
                rows.zero[r][e] = Centered<typename C::T, C::planes>::zero(static_cast<const int*>(w_zero)[row]);
            }

    float sum[G::chains][C::row_tiles][G::token_tiles][4] = {}, total[C::row_tiles][G::token_tiles][4] = {};
    Place<C::stages> place;
    for (int kb = 0; kb < k_blocks; kb += C::warps_k, place.advance()) {
        if constexpr (has_bulk_copies) {
            barrier_wait<false>(weights_full(place.index), place.parity);
            barrier_wait<false>(tokens_full(place.index), place.parity);
        } else {
            copy_async_wait<C::stages - 2>();
            __syncthreads();  // the stage is complete, and no one reads the one before it any more
            copy_stage(place.previous(), kb + (C::stages - 1) * C::warps_k);
        }
        const int mine = kb + slice;
        if (mine < k_blocks && warp_row * C::row_tiles < tiles) {
            const unsigned char* stage = shared + place.index * G::stage_bytes;
            multiply_block<C>(sum, total, rows, stage, warp_row, slice, mine, min(8, K / 32 - mine * 8));
        }
        if constexpr (has_bulk_copies) {
            __syncwarp();
            if (lane == 0) barrier_arrive(empty(place.index));
        }
    }

    // Sums change places: a lane holds rows g, g + 8 of tokens 2t, 2t + 1, the output wants neighbouring rows of one token
    if constexpr (!has_bulk_copies) copy_async_wait<0>();
    named_barrier(1, 32 * G::warps);
    float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = (warp_row * C::row_tiles + r) * 16 + i / 2 * 8 + lane / 4, token = n * 8 + lane % 4 * 2 + i % 2;
                float value = C::grouped ? total[r][n][i] : sum[0][r][n][i];
                if constexpr (!C::grouped && G::chains == 2) value += sum[1][r][n][i];
                if (C::tokens >= 8 || token < C::tokens) sums[(slice * C::tokens + token) * G::sum_pitch + row] = value;
            }
    named_barrier(1, 32 * G::warps);

    const int last_row = min(N, first_row + 16 * tiles);
    for (int i = threadIdx.x; i < source.tokens * (G::rows / 8); i += 32 * G::warps) {
        const int row = i % (G::rows / 8) * 8, token = i / (G::rows / 8);
        float output[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            float value = 0;
#pragma unroll
            for (int s = 0; s < C::warps_k; s++) value += sums[(s * C::tokens + token) * G::sum_pitch + row + j];
            output[j] = fmaf(value, row_scale[row + j], row_bias[row + j]);
        }
        const int count = last_row - (first_row + row);
        if (count > 0) store_8(y + (long long)(first_token + token) * N + first_row + row, output, count);
    }
}
