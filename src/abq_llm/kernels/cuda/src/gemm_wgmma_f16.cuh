// y[M, N] = x[M, K] w[N, K]^T on Hopper's warpgroup products of 16-bit floats: weights as bit-planes, x in fp16 or bf16.
//
// Planes become codes in bytes (int8.cuh), codes become q - z in floats, exactly; with groups, times the scale, rounded to T as
// the reference does. Per channel the scale comes last, in fp32. Sums are fp32.
//
// x comes as `x_tiles` writes it. A lane has four neighbouring columns of the weight in a word, columns 4t .. 4t+3 of 16; the
// product wants 2t, 2t+1, 2t+8, 2t+9 of it. The order of columns is free as long as both have the same: x is in that order.
#pragma once
#include "pairs.cuh"
#include "wgmma_weights.cuh"

template <class C> using FloatShape = Tile<C, 32, 4 * C::stage_steps, 0>;

template <int n> __device__ inline void float_product(half_t, int (&d)[n], const unsigned (&a)[4], unsigned long long b, int accumulate) {
    Wgmma<2 * n>::f16(d, a, b, accumulate);
}
template <int n> __device__ inline void float_product(bf16_t, int (&d)[n], const unsigned (&a)[4], unsigned long long b, int accumulate) {
    Wgmma<2 * n>::bf16(d, a, b, accumulate);
}

// Arguments as of `gemm_wgmma`, x as [KB][32 chunks][MT][8 tokens][8 columns]
template <class C>
__global__ void __launch_bounds__(FloatShape<C>::threads, C::resident)
    gemm_wgmma_f16(const uint4* weight, const unsigned char* x, const float* w_scale,
                   const typename Either<C::grouped, unsigned char, int>::type* w_zero, const int* w_total, const float* bias,
                   typename C::T* y, int M, int N, int KB, int MT, int groups) {
    using Shape = FloatShape<C>;
    using T = typename C::T;
    constexpr int unit = GroupRows<C>::steps;
    static_assert(C::stage_steps % unit == 0);
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    const Shared<C, Shape> shared{shared_address(dynamic_shared)};
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Tiles<C, Shape> tiles(M, N);
    const unsigned base = unknown_constant(Pairs<T>::base);

    shared.init_together();
    if (warpgroup == C::consumers) {
        produce(shared, tiles, weight, x, nullptr, nullptr, nullptr, N, KB, MT);
    } else {
        if constexpr (Shape::deals_registers) registers_raise<Shape::consumer_registers>();
        const int row_tile = warpgroup * C::slabs * 4 + warp;  // in the tile, of slab 0
        Place<C::stages> stage;
        Place<C::weight_slots> slot;
        const Turns<C> turns;
        turns.begin();
        for (; tiles.any(); tiles.advance()) {
            const int n0 = (tiles.row_tile0() + row_tile) * 16, n = n0 + lane / 4;  // of slab 0
            const int rows = ceil_div(N, 16) * 16, last = rows - 16 + lane / 4;     // row tiles past the last one repeat it
            int acc[C::slabs][C::tokens / 2];
            int accumulate = 0;
            unsigned zeros[C::slabs][2], scales[C::slabs][2];
            typename Either<C::grouped, GroupRows<C>, Nothing>::type group_rows[C::slabs];
#pragma unroll
            for (int slab = 0; slab < C::slabs; ++slab) {
                const int row = min(n + 64 * slab, last);
                if constexpr (C::grouped) {
                    group_rows[slab] = GroupRows<C>(w_scale, w_zero, w_total, row, rows, groups);
                } else {
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        zeros[slab][e] = zero_pair<T>(__ldg(w_zero + row + 8 * e));
                    }
                }
            }

            for (int kb = 0; kb < KB; ++kb) {
                Planes<C> planes;
                barrier_wait<C::debug>(shared.weight_full(slot.index), slot.parity);
                planes.load(shared.weight(slot.index) + row_tile * Shape::tile_bytes, lane);

#pragma unroll
                for (int first = 0; first < 8; first += unit) {  // steps of 32 columns
                    unsigned a[C::slabs][2 * unit][4];           // of 16 columns each
#pragma unroll
                    for (int slab = 0; slab < C::slabs; ++slab) {
                        if constexpr (C::grouped) {
                            if (group_rows[slab].boundary(first)) {
                                group_rows[slab].start();
#pragma unroll
                                for (int e = 0; e < 2; ++e) {
                                    zeros[slab][e] = zero_pair<T>(group_rows[slab].zeros[e]);
                                    scales[slab][e] = pair<T>(group_rows[slab].scales[e], group_rows[slab].scales[e]);
                                }
                            }
                            group_rows[slab].word += unit;
                        }
#pragma unroll
                        for (int i = 0; i < 2 * unit; ++i) {
#pragma unroll
                            for (int r = 0; r < 4; ++r) {
                                const unsigned codes = codes_of_step(planes.words[slab][i % 2 * 2 + r % 2], first + i / 2);
                                a[slab][i][r] = centered_pair<T>(codes, r / 2, zeros[slab][r % 2], base);
                                if constexpr (C::grouped) a[slab][i][r] = Pairs<T>::multiply(a[slab][i][r], scales[slab][r % 2]);
                            }
                            wgmma_fence_registers(a[slab][i]);  // made before the turn comes
                        }
                    }
                    if (first == 0) {  // all planes have come: only now may the copy engine overwrite them
                        shared.release_weight(slot.index);
                        slot.advance();
                    }
                    if (first % C::stage_steps == 0) barrier_wait<C::debug>(shared.x_full(stage.index), stage.parity);

                    turns.take();
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < 2 * unit; ++i) {
                        const int chunk = first % C::stage_steps * 4 + 2 * i;
                        const unsigned long long b = core_matrices(
                            shared.x(stage.index) + chunk * Shape::chunk_bytes, Shape::chunk_bytes, 128);
#pragma unroll
                        for (int slab = 0; slab < C::slabs; ++slab) float_product(T(), acc[slab], a[slab][i], b, accumulate);
                        accumulate = 1;
                    }
                    wgmma_commit();
                    turns.pass();
                    wgmma_wait<0>();
#pragma unroll
                    for (int slab = 0; slab < C::slabs; ++slab) wgmma_fence_registers(acc[slab]);
                    if ((first + unit) % C::stage_steps == 0) {
                        shared.release_x(stage.index, lane);
                        stage.advance();
                    }
                }
            }

#pragma unroll
            for (int slab = 0; slab < C::slabs; ++slab) {
                float row_scales[2], biases[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int row = min(n + 64 * slab + 8 * e, N - 1);
                    row_scales[e] = C::grouped ? 1.0f : __ldg(w_scale + row);
                    biases[e] = bias ? __ldg(bias + row) : -0.0f;  // y + -0 = y
                }
                write_out<C::tokens>(shared.out(), y, tiles.token0(), n0 + slab * 64, M, N, [&](int j, float(&results)[4]) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        results[i] = fmaf(__int_as_float(acc[slab][4 * j + i]), row_scales[i / 2], biases[i / 2]);
                    }
                });
            }
        }
        turns.end();
    }
}
