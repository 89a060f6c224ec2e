// y[M, N] = x W^T for few tokens, by binary tensor cores:
//
//     sum_k q_w q_x = sum_p sum_j 2^(p + j) popcount(plane p of W & plane j of x)
//
// The bit-planes of the tokens are the columns of the product: with 8 bits, one token fills the 8 columns of `mma_b1`, so
// the planes of W are multiplied as they come from memory: no expansion.
//
//              k-blocks of 256 columns:  0    1    2   ...        Each warp keeps its k-blocks of x in registers, and
//     tile 0   16 rows                  w0   w1   w2   w3  w0     goes from tile to tile of the rows of W, which come
//     tile 1   16 rows                  w0   w1   w2   w3  w0     through a queue of `C::stages` stages in shared memory:
//     ...                                                         a stage is one k-block of a row tile for every warp.
//                                                                 Sums of the warps meet in shared memory, too, those of
//                                                                 `C::pass` row tiles at a time.
//
//   C::columns    of a token in the product: its bits, rounded up to 2, 4, 8 or 16
//   C::tiles      of 8 columns; a block does tiles * 8 / columns tokens
//   C::x_blocks   k-blocks of a warp
//   C::full_rounds  of the k-blocks, in which every warp has one: C::x_blocks or one less
//   C::full_blocks  k-blocks have no columns but those of x
//   C::refill     the queue does not hold all that a block multiplies
//   C::window     stages under way before x is here
//   C::early      the next kernel may start, and read its weights, before x is here
//   C::fused      x is quantized here, by every block anew: no kernel before this one to wait for
//   C::in_floats  groups, or 16-bit x with a scale for every k-block: sums are scaled and added in fp32 part by part
#pragma once

#include "codes.cuh"
#include "decode_queue.cuh"
#include "epilogue.cuh"

template <class C> struct DecodeShape {
    static constexpr int threads = 32 * (C::warps + has_bulk_copies);  // of the queue, too
    static constexpr int tokens = C::tiles * 8 / C::columns;
};

// Sums over `lanes` neighbours, of which lane t keeps those of value[t], value[t + lanes], ... as value[0], value[1], ...
// Two values in four lanes: lanes t and t + 2 keep the same.
template <int lanes, class Sum, int n> __device__ inline void sum_over_lanes(Sum (&value)[n], int lane) {
#pragma unroll
    for (int distance = 1; distance < lanes; distance *= 2) {
        const bool odd = lane & distance;
        if (n < 2 * distance) value[0] += __shfl_xor_sync(~0u, value[0], distance);
#pragma unroll
        for (int i = 0; i < n / (2 * distance); i++) {
            const Sum sent = odd ? value[2 * i] : value[2 * i + 1];
            value[i] = (odd ? value[2 * i + 1] : value[2 * i]) + __shfl_xor_sync(~0u, sent, distance);
        }
    }
}

template <class C> __global__ void __launch_bounds__(DecodeShape<C>::threads, C::resident) decode(
    const uint4* weight, const void* x, const float* w_scale, const void* w_zero, const void* w_sum, const float* x_scale,
    const int* x_zero, const int* x_sum, const float* bias, typename C::T* y, int M, int N, int K, int k_blocks, int x_tiles,
    int row_tiles, int groups) {
    using T = typename C::T;
    using Sum = typename C::Sum;
    using Queue = WeightQueue<C>;
    constexpr int tokens = DecodeShape<C>::tokens, groups_met = Queue::groups_met;
    static_assert(C::pass == 1 || C::pass * tokens * 16 <= 32 * C::warps, "a thread writes outputs of one row");
    constexpr bool by_plane = !C::in_floats && C::tiles * C::planes <= 16;  // a sum for each plane fits in registers
    __shared__ Sum partial[2][C::pass][C::warps][tokens][16];
    __shared__ Grid token_grid[tokens];
    __shared__ int token_sum[tokens];
    extern __shared__ uint4 queues[];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);  // so that the compiler knows it is the same in all lanes
    const int first_tile = blockIdx.y * C::tiles, first_token = blockIdx.y * tokens;

    const Queue queue{reinterpret_cast<unsigned char*>(queues), weight, w_scale, w_zero, k_blocks, row_tiles, groups};
    auto has_block = [&](int b) { return b < C::full_rounds || b * C::warps + warp < k_blocks; };

    __shared__ unsigned long long full[C::stages], empty[C::stages];
    if constexpr (has_bulk_copies) {
        if (threadIdx.x == 0) {
#pragma unroll
            for (int s = 0; s < C::stages; s++) {
                barrier_init(shared_address(&full[s]), 1);
                barrier_init(shared_address(&empty[s]), 32 * C::warps);
            }
            barrier_init_fence();
        }
        __syncthreads();
        if (warp == C::warps) {
            queue.fill(full, empty, lane);
            return;
        }
    }
    auto load = [&](int stage, int row_tile, int b) {  // where there is no copy engine
        queue.copy_async(stage, row_tile, b * C::warps + warp, warp, lane, row_tile < row_tiles && has_block(b));
    };
    auto sync_block = [&] {  // but for the warp that copies
        if constexpr (has_bulk_copies)
            named_barrier(1, 32 * C::warps);
        else
            __syncthreads();
    };
    // What the epilogue needs of the row whose outputs this thread will write; also loaded a pass ahead
    const int tile_out = C::pass == 1 ? 0 : threadIdx.x / (tokens * 16);  // in the pass
    float scale_next = 1, offset_next = 0;
    int zero_next = 0, sum_next = 0;
    auto load_row = [&](int first_row_tile) {
        const int row = min(int(first_row_tile + tile_out * gridDim.x), row_tiles - 1) * 16 + threadIdx.x % 16;
        if constexpr (!C::grouped) scale_next = w_scale[row];
        if constexpr (!C::in_floats) {
            zero_next = static_cast<const int*>(w_zero)[row];
            sum_next = static_cast<const int*>(w_sum)[row];
        } else if constexpr (C::grouped && C::bits < 16) {
            offset_next = static_cast<const float*>(w_sum)[row];
        }
    };
    if constexpr (!has_bulk_copies)
#pragma unroll
        for (int s = 0; s < C::stages; s++) load(s, blockIdx.x + s / C::x_blocks * gridDim.x, s % C::x_blocks);
    load_row(blockIdx.x);
    if constexpr (C::programmatic) {
        if constexpr (C::early) grid_dependency_launch();
        grid_dependency_wait();
        if constexpr (!C::early) grid_dependency_launch();
    }

    // This warp's k-blocks of x, as fragments of bit-planes
    uint2 fragment[C::x_blocks][C::tiles];
    if constexpr (C::fused) {
        __shared__ float tops[tokens][C::warps], bottoms[tokens][C::warps];
        if (threadIdx.x < tokens) token_sum[threadIdx.x] = 0;
        auto source = [&](int b, int h) {
            return quad_source<C::group_size, C::group_padded, C::full_blocks>(256 * (b * C::warps + warp) + fragment_column(lane, h), K);
        };
        Quad<T> quad[tokens][C::x_blocks][2] = {};
#pragma unroll
        for (int m = 0; m < tokens; m++) {
            const T* token = static_cast<const T*>(x) + (long long)min(first_token + m, M - 1) * K;
#pragma unroll
            for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (has_block(b)) quad[m][b][h] = load_quad<T, C::aligned>(token, source(b, h));
        }
#pragma unroll
        for (int m = 0; m < tokens; m++) {
            Range<T> range;
#pragma unroll
            for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
                for (int h = 0; h < 2; h++) range.add(quad[m][b][h]);
            const float top = warp_max(range.hi()), bottom = warp_max(range.lo());
            if (lane == 0) {
                tops[m][warp] = top;
                bottoms[m][warp] = bottom;
            }
        }
        sync_block();
        unsigned words[C::x_blocks][C::tiles][2] = {};
#pragma unroll
        for (int m = 0; m < tokens; m++) {
            const float top = warp_max(tops[m][lane % C::warps]), bottom = warp_max(bottoms[m][lane % C::warps]);
            const Grid grid = choose_grid<C::bits, C::symmetric>(-bottom, top);
            int sum = 0;
#pragma unroll
            for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    if (!has_block(b)) continue;
                    const unsigned codes = codes_of<C::bits>(quad[m][b][h], source(b, h), grid);
                    sum = sum_of_bytes(codes, sum);
                    words[b][m * C::columns / 8][h] |= codes << (m * C::columns % 8);
                }
            sum = __reduce_add_sync(~0u, sum);
            if (lane == 0) atomicAdd(&token_sum[m], sum);
            if (threadIdx.x == 0) token_grid[m] = grid;
        }
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
            for (int n = 0; n < C::tiles; n++) fragment[b][n] = plane_fragment(words[b][n][0], words[b][n][1], lane);
    } else {
        for (int i = threadIdx.x; i < tokens && C::bits < 16; i += 32 * C::warps) {
            const int m = min(first_token + i, M - 1);
            token_grid[i] = {x_scale[m], 0, x_zero[m]};
            token_sum[i] = x_sum[m];
        }
#pragma unroll
        for (int b = 0; b < C::x_blocks; b++)
#pragma unroll
            for (int n = 0; n < C::tiles; n++) {
                const int kb = min(b * C::warps + warp, k_blocks - 1);
                fragment[b][n] = static_cast<const uint2*>(x)[((long long)kb * x_tiles + first_tile + n) * 32 + lane];
            }
    }

    int parity = 0, stage = 0, filled = 0;
    for (int first_row_tile = blockIdx.x; first_row_tile < row_tiles; first_row_tile += C::pass * gridDim.x, parity ^= 1) {
        const int n_out = (first_row_tile + tile_out * gridDim.x) * 16 + threadIdx.x % 16;
        const float scale_out = scale_next, offset_out = offset_next;
        const int zero_out = zero_next, sum_out = sum_next;
        if (first_row_tile + C::pass * gridDim.x < row_tiles) load_row(first_row_tile + C::pass * gridDim.x);

#pragma unroll C::pass * C::x_blocks * C::planes * C::tiles <= 32 ? C::pass : 1
        for (int r = 0; r < C::pass; r++) {
            const int row_tile = first_row_tile + r * gridDim.x;  // past the last one, sums that no one reads
            int plane_sums[by_plane ? C::tiles : 1][by_plane ? C::planes : 1][4] = {};
            Sum sums[C::tiles][2] = {};  // columns 2t + 2 * column 2t + 1; rows g and g + 8
#pragma unroll
            for (int b = 0; b < C::x_blocks; b++) {
                const int kb = b * C::warps + warp;
                if constexpr (has_bulk_copies) {
                    if (row_tile < row_tiles) barrier_wait<false>(shared_address(&full[stage]), filled);
                } else {
                    copy_async_wait<C::stages - 1>();
                    if constexpr (C::in_floats) __syncwarp();  // other lanes have copied scales and zero points
                }
                const uint4* from = reinterpret_cast<const uint4*>(queue.planes(stage, warp)) + lane;
                uint4 planes[C::planes];
#pragma unroll
                for (int p = 0; p < C::planes; p++) planes[p] = from[p * 32];
                if (!has_block(b)) {
                    // nothing
                } else if constexpr (by_plane) {
#pragma unroll
                    for (int p = 0; p < C::planes; p++)
#pragma unroll
                        for (int n = 0; n < C::tiles; n++) mma_b1(plane_sums[n][p], planes[p], fragment[b][n]);
                } else if constexpr (!C::in_floats) {
#pragma unroll
                    for (int n = 0; n < C::tiles; n++)
#pragma unroll
                        for (int p = 0; p < C::planes; p++) {
                            int product[4] = {};
                            mma_b1(product, planes[p], fragment[b][n]);
#pragma unroll
                            for (int half = 0; half < 2; half++)
                                sums[n][half] += (product[2 * half] + 2 * product[2 * half + 1]) << p;
                        }
                } else {
                    const unsigned char* table = queue.table(stage, warp);
                    float scale[groups_met][2];  // of rows g and g + 8
                    int zero[groups_met][2];
#pragma unroll
                    for (int i = 0; i < groups_met; i++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int row = i * 16 + g + 8 * half;
                            scale[i][half] = C::grouped ? reinterpret_cast<const float*>(table)[row] : 1;
                            zero[i][half] = C::grouped ? table[Queue::scale_bytes + row] : reinterpret_cast<const int*>(table)[row];
                        }
                    const int first = 8 * kb / C::group_words;
#pragma unroll
                    for (int n = 0; n < C::tiles; n++) {
                        // Column 2t + 1 against column 2t: twice the weight, and 16 bits are signed
                        const int second = C::columns == 16 && n % 2 == 1 && t == 3 ? -2 : 2;
                        float x_factor = 1;
                        if constexpr (C::bits == 16) x_factor = x_scale[kb * M + min(first_token + n / 2, M - 1)];
#pragma unroll
                        for (int i = 0; i < groups_met; i++) {
                            // Words of 32 columns of this group in the k-block: bits i of every byte
                            const int begin = min(max((first + i) * C::group_words - 8 * kb, 0), 8);
                            const int end = min((first + i + 1) * C::group_words - 8 * kb, 8);
                            const unsigned mask = 0x01010101u * ((1u << end) - (1u << begin));
                            const uint2 masked = make_uint2(fragment[b][n].x & mask, fragment[b][n].y & mask);
                            int ones[4] = {};
                            mma_b1(ones, make_uint4(~0u, ~0u, ~0u, ~0u), masked);
                            int sum[4] = {};
#pragma unroll
                            for (int p = 0; p < C::planes; p++) {
                                int product[4] = {};
                                mma_b1(product, planes[p], masked);
#pragma unroll
                                for (int e = 0; e < 4; e++) sum[e] += product[e] << p;
                            }
                            const int x_bits = ones[0] + second * ones[1];
#pragma unroll
                            for (int half = 0; half < 2; half++) {
                                const int value = sum[2 * half] + second * sum[2 * half + 1] - zero[i][half] * x_bits;
                                sums[n][half] += scale[i][half] * x_factor * float(value);
                            }
                        }
                    }
                    if constexpr (!has_bulk_copies) __syncwarp();  // all lanes have read the table
                }
                if constexpr (has_bulk_copies) {
                    if (C::refill && row_tile < row_tiles) barrier_arrive(shared_address(&empty[stage]));
                } else if constexpr (C::refill) {
                    constexpr int ahead = C::stages;
                    load(stage, row_tile + (b + ahead) / C::x_blocks * gridDim.x, (b + ahead) % C::x_blocks);
                } else {
                    copy_async_commit();  // for `copy_async_wait` to count
                }
                stage = stage == C::stages - 1 ? 0 : stage + 1;
                if (stage == 0) filled ^= 1;
            }

            // The columns of a token together: over the two tiles of 16 bits, then over the lanes
            constexpr int lanes = C::columns >= 8 ? 4 : C::columns / 2, tiles_of_token = C::columns == 16 ? 2 : 1;
            constexpr int values = 2 * C::tiles / tiles_of_token;
            Sum value[values] = {};
#pragma unroll
            for (int n = 0; n < C::tiles; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    if constexpr (by_plane)
#pragma unroll
                        for (int p = 0; p < C::planes; p++)
                            sums[n][half] += (plane_sums[n][p][2 * half] + 2 * plane_sums[n][p][2 * half + 1]) << p;
                    const int weight_of_column = 1 << (2 * t % C::columns + n % tiles_of_token * 8);
                    value[n / tiles_of_token * 2 + half] += sums[n][half] * Sum(weight_of_column);
                }
            sum_over_lanes<lanes>(value, t);
#pragma unroll
            for (int j = 0; j < ceil_div(values, lanes); j++) {
                const int i = lanes * j + t % lanes, token = i / 2 * (C::columns < 8 ? 8 / C::columns : 1) + t / lanes;
                if (values >= lanes || t < values) partial[parity][r][warp][token][i % 2 * 8 + g] = value[j];
            }
        }

        sync_block();

#pragma unroll 1
        for (int at = threadIdx.x % (C::pass == 1 ? 1024 : tokens * 16); at < tokens * 16; at += 32 * C::warps) {
            const int m = first_token + at / 16;
            if (tile_out >= C::pass || m >= M || n_out >= N) continue;
            Sum sum = 0;
#pragma unroll
            for (int w = 0; w < C::warps; w++) sum += partial[parity][tile_out][w][at / 16][at % 16];
            float value;
            if constexpr (C::bits == 16) {
                value = __fmul_rn(sum, scale_out);
            } else {
                const Grid grid = token_grid[at / 16];
                if constexpr (C::in_floats) {
                    value = output_grouped(sum, offset_out, grid.zero, grid.scale);
                } else {
                    value = output_per_channel(sum, zero_out, sum_out, scale_out, grid.zero, token_sum[at / 16], grid.scale);
                }
            }
            y[(long long)m * N + n_out] = from_float<T>(bias ? __fadd_rn(value, bias[n_out]) : value);
        }
    }
}
