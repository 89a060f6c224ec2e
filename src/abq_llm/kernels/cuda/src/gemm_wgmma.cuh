// y[M, N] = x[M, K] w[N, K]^T on Hopper's warpgroup int8 products, for prefill: weights as bit-planes, 8-bit activations.
//
// y^T = w x^T: w is the operand in registers, so that its planes become bytes there and nowhere else (int8.cuh); x comes from
// shared memory as the quantizer wrote it. A product of a warpgroup runs while the next step's bytes are made; the other
// warpgroups fill what gaps are left.
#pragma once
#include "int8.cuh"
#include "wgmma_tile.cuh"

template <bool condition, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };

__device__ constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

template <class C> using GemmShape = Tile<C, 16, 2 * C::stage_steps>;

// The planes of a k-block that one lane of a warp holds, for each of its slabs
template <class C> struct Planes {
    static constexpr int width = power_of_two_above(C::planes);
    unsigned words[C::slabs][4][width];  // [][register of the fragment][]

    __device__ void load(unsigned address, int lane) {
#pragma unroll
        for (int slab = 0; slab < C::slabs; ++slab) {
#pragma unroll
            for (int p = 0; p < width; ++p) {
                uint4 plane = make_uint4(0, 0, 0, 0);
                if (p < C::planes) plane = load_shared_4(address + (slab * 4 * C::planes + p) * 512 + lane * 16);
                words[slab][0][p] = plane.x, words[slab][1][p] = plane.y;
                words[slab][2][p] = plane.z, words[slab][3][p] = plane.w;
            }
#pragma unroll
            for (int r = 0; r < 4; ++r) planes_to_steps<C::planes>(words[slab][r]);
        }
    }
};

// Stays where it is written: the compiler would move a load to its first use. Not through the read-only cache, which knows
// nothing of what the previous kernel wrote meanwhile.
__device__ inline int2 load_global_2(const int* address) {
    int2 value;
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "l"(address) : "memory");
    return value;
}

// Sums over groups, in fp32: rows n, n + 8 of one lane, and the tokens of the tile
template <class C> struct GroupSums {
    static constexpr int span = greatest_divisor(C::group_words, 8);  // a group ends only after a multiple of so many steps
    float total[C::tokens / 2];
    float scales[2];  // of the present group
    int minus_zeros[2];
    int2 codes[C::tokens / 8];  // sums of the tokens' codes over the present group
    int group = 0;
    const float* scale;
    const unsigned char* zero;
    const int* token_sums;  // group_sum[group][m]
    int row_stride, token_stride, groups;

    // Both long before they are used: nothing else runs in this warpgroup while a group is added
    __device__ void load_tokens() {
        if (!C::has_zero_point || group >= groups) return;
#pragma unroll
        for (int j = 0; j < C::tokens / 8; ++j) codes[j] = load_global_2(token_sums + 8 * j);
    }
    __device__ void load_rows() {
        if (group >= groups) return;
        scales[0] = __ldg(scale), scales[1] = __ldg(scale + 8);
        if constexpr (C::has_zero_point) minus_zeros[0] = -int(__ldg(zero)), minus_zeros[1] = -int(__ldg(zero + 8));
    }
    __device__ void add(const int (&acc)[C::tokens / 2]) {
#pragma unroll
        for (int j = 0; j < C::tokens / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int v = acc[4 * j + i];
                if constexpr (C::has_zero_point) v += minus_zeros[i / 2] * (i % 2 ? codes[j].y : codes[j].x);
                total[4 * j + i] = fmaf(float(v), scales[i / 2], total[4 * j + i]);
            }
        }
        ++group, scale += row_stride, zero += row_stride, token_sums += token_stride;
        load_rows();
    }
};

// blocks: at most as many as tiles of y, which they share. MT, the token tiles of 8 that x has, is a multiple of
// tokens / 8. If grouped, w_scale, w_zero and x_sum are [groups][...], and w_centered is the offset.
template <class C>
__global__ void __launch_bounds__(GemmShape<C>::threads, C::resident)
    gemm_wgmma(const uint4* weight, const unsigned char* x, const float* w_scale,
               const typename Either<C::grouped, unsigned char, int>::type* w_zero,
               const typename Either<C::grouped, float, int>::type* w_centered, const float* x_scale, const int* x_zero,
               const int* x_sum, const float* bias, typename C::T* y, int M, int N, int KB, int MT, int groups) {
    static_assert(!C::grouped || C::slabs == 1, "grouped sums need a second set of accumulators");
    using Shape = GemmShape<C>;
    using T = typename C::T;
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    const Shared<C, Shape> shared{shared_address(dynamic_shared)};
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Tiles<C, Shape> tiles(M, N);

    shared.init_together();
    if (warpgroup == C::consumers) {
        produce<2 * C::stage_steps>(shared, tiles, weight, x, x_scale, x_zero, x_sum, N, KB, MT);
    } else {
        if constexpr (Shape::deals_registers) registers_raise<Shape::consumer_registers>();
        if constexpr (C::grouped && C::programmatic) grid_dependency_wait();  // for the sums of the groups
        const int row_tile = warpgroup * C::slabs * 4 + warp;  // in the tile, of slab 0
        Place<C::stages> stage;
        Place<C::weight_slots> slot;
        for (Place<2> buffer; tiles.any(); tiles.advance(), buffer.advance()) {
            const int token0 = tiles.token0();
            const int n = (tiles.row_tile0() + row_tile) * 16 + lane / 4;  // of slab 0
            int acc[C::slabs][C::tokens / 2];
            int accumulate = 0;
            GroupSums<C> sums;
            if constexpr (C::grouped) {
#pragma unroll
                for (int i = 0; i < C::tokens / 2; ++i) sums.total[i] = 0;
                const int first = min(n, ceil_div(N, 16) * 16 - 16 + lane / 4);  // row tiles past the last one repeat it
                sums.scale = w_scale + first, sums.zero = w_zero + first;
                sums.token_sums = x_sum + token0 + lane % 4 * 2;
                sums.row_stride = ceil_div(N, 16) * 16, sums.token_stride = MT * 8, sums.groups = groups;
                sums.load_rows();
            }

            for (int kb = 0; kb < KB; ++kb) {
                Planes<C> planes;
                barrier_wait<C::debug>(shared.weight_full(slot.index), slot.parity);
                planes.load(shared.weight(slot.index) + row_tile * Shape::tile_bytes, lane);
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.weight_empty(slot.index));
                slot.advance();

#pragma unroll
                for (int i = 0; i < 8; ++i) {  // 32 columns each
                    if constexpr (C::grouped) {
                        if (i % GroupSums<C>::span == 0) sums.load_tokens();
                    }
                    if (i % C::stage_steps == 0) barrier_wait<C::debug>(shared.x_full(stage.index), stage.parity);
                    const unsigned long long b = core_matrices(
                        shared.x(stage.index) + i % C::stage_steps * 2 * Shape::chunk_bytes, Shape::chunk_bytes, 128);
#pragma unroll
                    for (int slab = 0; slab < C::slabs; ++slab) {
                        unsigned a[4];
#pragma unroll
                        for (int r = 0; r < 4; ++r) a[r] = codes_of_step(planes.words[slab][r], i);
                        wgmma_fence();
                        Wgmma<C::tokens>::u8(acc[slab], a, b, accumulate);
                        wgmma_commit();
                        wgmma_wait<1>();  // all but this one: the stage before is free
                        if (i > 0 && i % C::stage_steps == 0 && slab == 0) shared.release_x(stage.previous(), lane);
                    }
                    accumulate = 1;
                    if (i == 7) {
                        wgmma_wait<0>();  // nothing runs across the loop's back edge: see wgmma_wait
                        shared.release_x(stage.index, lane);
                    }
                    if (i % C::stage_steps == C::stage_steps - 1) stage.advance();

                    if constexpr (C::grouped) {
                        if ((i + 1) % GroupSums<C>::span == 0) {
                            wgmma_wait<0>();
                            wgmma_fence_registers(acc[0]);
                            const bool ends = (8 * kb + i + 1) % C::group_words == 0 || (kb == KB - 1 && i == 7);
                            if (ends && sums.group < groups) {
                                sums.add(acc[0]);
                                accumulate = 0;
                            }
                        }
                    }
                }
            }
#pragma unroll
            for (int slab = 0; slab < C::slabs; ++slab) wgmma_fence_registers(acc[slab]);

            barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);
            const unsigned out = shared.out();
            if constexpr (C::grouped) {
                float offsets[2], biases[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    offsets[i] = __ldg(w_centered + min(n + 8 * i, N - 1));
                    biases[i] = bias ? __ldg(bias + min(n + 8 * i, N - 1)) : 0;
                }
                write_out<C::tokens>(out, y, token0, n - lane / 4 - warp * 16, M, N, [&](int j, float(&results)[4]) {
                    const unsigned data = shared.token_data(buffer.index, j, lane);
                    const int2 scale = load_shared_2(data);
                    const int2 zero = load_shared_2(data + C::tokens * 4);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float scale_i = __int_as_float(i % 2 ? scale.y : scale.x);
                        const int zero_i = i % 2 ? zero.y : zero.x;
                        results[i] = output_grouped(sums.total[4 * j + i], offsets[i / 2], zero_i, scale_i) + biases[i / 2];
                    }
                });
            } else {
#pragma unroll
                for (int slab = 0; slab < C::slabs; ++slab) {
                    const int n0 = n + slab * 64;
                    const Row rows[2] = {{n0, w_scale, w_zero, w_centered, bias, N},
                                         {n0 + 8, w_scale, w_zero, w_centered, bias, N}};
                    write_out<C::tokens>(out, y, token0, n0 - lane / 4 - warp * 16, M, N, [&](int j, float(&results)[4]) {
                        const int(&d)[C::tokens / 2] = acc[slab];
                        const int products[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
                        per_channel<C::tokens>(results, products, rows, shared.token_data(buffer.index, j, lane));
                    });
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.tokens_empty(buffer.index));
        }
    }
}
