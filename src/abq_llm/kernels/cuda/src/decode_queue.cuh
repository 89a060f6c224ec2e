// The weights of `decode` on their way through shared memory: a queue of stages, of one k-block of a row tile for every warp.
//
// From sm_90 on one warp more fills it by the copy engine: if the other warps copied, what they do besides would stand
// behind their copies. Elsewhere each lane copies what it will multiply.
//
// Weights do not depend on the kernel before, so the queue is filled before the wait for it; but the message that it has
// ended queues behind the copies under way, so these are no more than `C::window` stages.
//
// C is what decode.cuh says.
#pragma once

#include "bulk.cuh"

template <class C> struct WeightQueue {
    // A stage: planes of the warps' k-blocks | a table for each warp, if any: scales fp32 [groups_met][16] and zero points
    // [groups_met][16] bytes, or int32 [16] if not grouped
    static constexpr int groups_met = C::in_floats ? groups_in_block(C::group_words) : 0;
    static constexpr int plane_bytes = C::planes * 512;
    static constexpr int scale_bytes = C::grouped ? groups_met * 64 : 0, zero_bytes = groups_met * (C::grouped ? 16 : 64);
    static constexpr int table_bytes = scale_bytes + zero_bytes;
    static constexpr int stage_bytes = C::warps * (plane_bytes + table_bytes);
    static_assert(C::shared_bytes == C::stages * stage_bytes, "the host must ask for as much shared memory");

    unsigned char* base;
    const uint4* weight;
    const float* scale;
    const void* zero;
    int k_blocks, row_tiles, groups;

    __device__ unsigned char* planes(int stage, int warp) const { return base + stage * stage_bytes + warp * plane_bytes; }
    __device__ unsigned char* table(int stage, int warp) const {
        return base + stage * stage_bytes + C::warps * plane_bytes + warp * table_bytes;
    }
    __device__ const uint4* plane_source(int row_tile, int kb) const {
        return weight + ((long long)row_tile * k_blocks + kb) * (C::planes * 32);
    }
    // Of 16-byte piece i of a k-block's scales and zero points
    __device__ const float* scale_source(int row_tile, int kb, int i) const {
        const int group = min(8 * kb / C::group_words + i / 4, groups - 1);
        return scale + (long long)group * (row_tiles * 16) + row_tile * 16 + i % 4 * 4;
    }
    __device__ const void* zero_source(int row_tile, int kb, int i) const {
        if constexpr (!C::grouped) return static_cast<const int*>(zero) + row_tile * 16 + i * 4;
        const int group = min(8 * kb / C::group_words + i, groups - 1);
        return static_cast<const unsigned char*>(zero) + (long long)group * (row_tiles * 16) + row_tile * 16;
    }

    // All that the block multiplies, by one warp and the copy engine. `full` and `empty` count what comes and who has read.
    __device__ void fill(unsigned long long (&full)[C::stages], unsigned long long (&empty)[C::stages], int lane) const {
        int b = 0, stage = 0, filled = 1;
        for (int step = 0, row_tile = blockIdx.x; row_tile < row_tiles; step++) {
            if constexpr (C::refill) barrier_wait<false>(shared_address(&empty[stage]), filled);
            if (step >= C::window && step < C::stages) barrier_wait<false>(shared_address(&full[step - C::window]), 0);
            const unsigned barrier = shared_address(&full[stage]);
            const int first = b * C::warps, blocks = min(C::warps, k_blocks - first);
            if (lane == 0) {
                barrier_arrive_expecting(barrier, blocks * (plane_bytes + table_bytes));
                bulk_copy(shared_address(planes(stage, 0)), plane_source(row_tile, first), blocks * plane_bytes, barrier);
            }
            if constexpr (C::in_floats) {
                __syncwarp();
                const unsigned to = shared_address(table(stage, lane));
                if (C::grouped && lane < blocks) {
#pragma unroll
                    for (int i = 0; i < groups_met; i++) {
                        bulk_copy(to + i * 64, scale_source(row_tile, first + lane, 4 * i), 64, barrier);
                        bulk_copy(to + scale_bytes + i * 16, zero_source(row_tile, first + lane, i), 16, barrier);
                    }
                } else if (lane < blocks) {
                    bulk_copy(to, zero_source(row_tile, first, 0), 64, barrier);
                }
            }
            b = b == C::x_blocks - 1 ? 0 : b + 1;
            if (b == 0) row_tile += gridDim.x;
            stage = stage == C::stages - 1 ? 0 : stage + 1;
            if (stage == 0) filled ^= 1;
        }
    }

    // What a lane of `warp` copies of a stage itself; nothing unless `is_there`
    __device__ void copy_async(int stage, int row_tile, int kb, int warp, int lane, bool is_there) const {
        if (is_there) {
            const uint4* from = plane_source(row_tile, kb);
#pragma unroll
            for (int p = 0; p < C::planes; p++) copy_async_16(planes(stage, warp) + (p * 32 + lane) * 16, from + p * 32 + lane);
            unsigned char* to = table(stage, warp) + lane * 16;
            if (lane < scale_bytes / 16) copy_async_16(to, scale_source(row_tile, kb, lane));
            if (lane < zero_bytes / 16) copy_async_16(to + scale_bytes, zero_source(row_tile, kb, lane));
        }
        copy_async_commit();
    }
};
