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
// From sm_90 on two warps more fill the queue by the copy engine, but for the small tables of groups. One copies weights, as
// `decode_queue.cuh` does, the other x, and it alone waits for the kernel before. Elsewhere all warps copy.
//
//   C::tokens       of a block; 8 n, or 1, 2, 4
//   C::window       stages of weights under way before any has come
//   C::full_blocks  k-blocks have no columns but those of x
#pragma once
#include "epilogue.cuh"
#include "mma_f16_block.cuh"

// What a block copies of global memory
template <class C> struct MmaF16Source {
    using G = MmaF16<C>;
    const unsigned char *weight, *x;
    const float* scale;
    const unsigned char* zero;
    int K, k_blocks, groups, padded_rows, first_tile, tiles, first_token, tokens;

    __device__ int slices(int kb) const { return min(C::warps_k, k_blocks - kb); }
    __device__ int plane_bytes(int kb) const { return slices(kb) * tiles * G::plane_bytes; }
    __device__ int token_bytes(int kb) const { return min(C::warps_k * 256, K - kb * 256) * 2; }

    // Those pieces of a stage from k-block kb on that are worker's: `copy(to, from, bytes)`
    template <class Copy> __device__ void copy_planes(unsigned char* stage, int kb, int worker, int workers, Copy copy) const {
        for (int i = worker; i < tiles; i += workers) {
            copy(stage + i * C::warps_k * G::plane_bytes, weight + ((long long)(first_tile + i) * k_blocks + kb) * G::plane_bytes,
                 slices(kb) * G::plane_bytes);
        }
    }
    // Scales and zero points, 16 bytes a time: four and one of a row tile
    __device__ void copy_tables(unsigned char* stage, int kb, int worker, int workers) const {
        for (int i = worker; i < slices(kb) * G::slots * G::row_tiles * 5; i += workers) {
            const int place = i / (5 * G::row_tiles), tile = i / 5 % G::row_tiles, part = i % 5, row = place * G::rows + tile * 16;
            const int group = min(8 * (kb + place / G::slots) / C::group_words + place % G::slots, groups - 1);
            const long long from = (long long)group * padded_rows + (first_tile + tile) * 16;
            if (tile >= tiles) continue;
            if (part < 4)
                copy_async_16(stage + G::scale_offset + (row + 4 * part) * 4, scale + from + 4 * part);
            else
                copy_async_16(stage + G::zero_offset + row, zero + from);
        }
    }
    // Rows of x
    template <class Copy> __device__ void copy_tokens(unsigned char* stage, int kb, int worker, int workers, Copy copy) const {
        for (int i = worker; i < tokens; i += workers) {
            copy(stage + G::x_offset + i * G::x_pitch, x + ((long long)(first_token + i) * K + kb * 256) * 2, token_bytes(kb));
        }
    }
};

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

    if constexpr (C::programmatic) grid_dependency_launch();
    if constexpr (has_bulk_copies) {
        auto by_copy_engine = [](unsigned barrier) {
            return [barrier](void* to, const void* from, int bytes) { bulk_copy(shared_address(to), from, bytes, barrier); };
        };
        if (threadIdx.x == 0) {
#pragma unroll
            for (int stage = 0; stage < C::stages; stage++) {
                barrier_init(weights_full(stage), C::grouped ? 33 : 1);  // a warp's copies, and the copy engine's
                barrier_init(tokens_full(stage), 1);
                barrier_init(empty(stage), 32 * G::warps);
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
                unsigned char* stage = shared + place.index * G::stage_bytes;
                if (lane == 0) barrier_arrive_expecting(full, source.plane_bytes(kb));
                __syncwarp();
                source.copy_planes(stage, kb, lane, 32, by_copy_engine(full));
                if constexpr (C::grouped) {
                    source.copy_tables(stage, kb, lane, 32);
                    copy_async_arrive(full);
                }
            }
            copy_async_wait_all();
            return;
        }
        if (warp == G::warps + 1) {
            if constexpr (C::programmatic) grid_dependency_wait();
            Place<C::stages> place;
            for (int kb = 0; kb < k_blocks; kb += C::warps_k, place.advance()) {
                barrier_wait<false>(empty(place.index), place.parity ^ 1);
                const unsigned full = tokens_full(place.index);
                if (lane == 0) barrier_arrive_expecting(full, source.tokens * source.token_bytes(kb));
                __syncwarp();
                source.copy_tokens(shared + place.index * G::stage_bytes, kb, lane, 32, by_copy_engine(full));
            }
            return;
        }
    }
    auto copy_stage = [&](int stage, int kb) {  // where there is no copy engine
        if (kb < k_blocks) {
            unsigned char* to = shared + stage * G::stage_bytes;
            auto by_lanes = [&](unsigned char* to, const unsigned char* from, int bytes) {
                for (int i = lane * 16; i < bytes; i += 512) copy_async_16(to + i, from + i);
            };
            source.copy_planes(to, kb, warp, G::warps, by_lanes);
            if constexpr (C::grouped) source.copy_tables(to, kb, threadIdx.x, G::threads);
            source.copy_tokens(to, kb, warp, G::warps, by_lanes);
        }
        copy_async_commit();
    };
    if constexpr (!has_bulk_copies)
#pragma unroll
        for (int stage = 0; stage < C::stages - 1; stage++) copy_stage(stage, stage * C::warps_k);

    const WarpPlace<C> at(warp);
    float* row_scale = reinterpret_cast<float*>(shared + G::shared_bytes - 8 * G::rows);
    float* row_bias = row_scale + G::rows;
    for (int row = threadIdx.x; row < G::rows; row += 32 * G::warps) {
        const int n = min(first_row + row, N - 1);
        row_scale[row] = C::grouped ? 1.0f : w_scale[n];
        row_bias[row] = bias ? bias[n] : -0.0f;  // y + -0 = y
    }
    WarpSums<C> sums;
    if constexpr (!C::grouped)
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = min(first_row + (at.row_tile + r) * 16, 16 * row_tiles - 16) + lane / 4 + 8 * e;
                const int zero = static_cast<const int*>(w_zero)[row];
#pragma unroll
                for (int field = 0; field < G::Codes::fields; field++) sums.zero[field][r][e] = G::Codes::zero(zero, field);
            }

    Place<C::stages> place;
    for (int kb = 0; kb < k_blocks; kb += C::warps_k, place.advance()) {
        if constexpr (has_bulk_copies) {
            barrier_wait<false>(weights_full(place.index), place.parity);
        } else {
            copy_async_wait<C::stages - 2>();
            __syncthreads();  // the stage is complete, and no one reads the one before it any more
            copy_stage(place.previous(), kb + (C::stages - 1) * C::warps_k);
        }
        auto wait_for_tokens = [&] {
            if constexpr (has_bulk_copies) barrier_wait<false>(tokens_full(place.index), place.parity);
        };
        const int mine = kb + at.slice;
        if (mine < k_blocks && at.row_tile < tiles)
            sums.add_block(shared + place.index * G::stage_bytes, at, mine, min(8, K / 32 - mine * 8), wait_for_tokens);
        else
            wait_for_tokens();
        if constexpr (has_bulk_copies) barrier_arrive(empty(place.index));
    }

    // Sums change places: a lane holds rows g, g + 8 of tokens 2t, 2t + 1, the output wants neighbouring rows of one token
    if constexpr (!has_bulk_copies) copy_async_wait_all();
    named_barrier(1, 32 * G::warps);
    float* exchanged = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
        for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = (at.row_tile + r) * 16 + i / 2 * 8 + lane / 4, token = n * 8 + lane % 4 * 2 + i % 2;
                if (token < G::warp_tokens)
                    exchanged[(at.slice * C::tokens + at.token + token) * G::sum_pitch + row] = sums.result(r, n, i);
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
            for (int s = 0; s < C::warps_k; s++) value += exchanged[(s * C::tokens + token) * G::sum_pitch + row + j];
            output[j] = fmaf(value, row_scale[row + j], row_bias[row + j]);
        }
        const int count = last_row - (first_row + row);
        if (count > 0) store_8(y + (long long)(first_token + token) * N + first_row + row, output, count);
    }
}
