// y[M, N] = x[M, K] w[N, K]^T on Hopper's warpgroup binary products, for prefill with fewer than 8 pairs of bit-planes:
//
//   sum_k w x = sum_i sum_j 2^(i+j) popcount(plane_i(w) & plane_j(x))
//
// One binary product does 256 columns in the time in which an int8 product does 32, so p * q of them take p * q / 8 of it.
// Planes of w go from shared memory to registers as they are; planes of x are read from there as tiles of 8 tokens x 128
// bits. Pairs with the same i + j share accumulators; the p + q - 1 sets of them bound `tokens`.
#pragma once
#include "wgmma_tile.cuh"

template <class C> using BinaryShape = Tile<C, 2 * C::x_planes, 2 * C::x_planes, 3>;

template <class C> struct BinaryProducts {
    using Shape = BinaryShape<C>;
    static constexpr int sets = C::planes + C::x_planes - 1;
    static_assert(C::slabs == 1 && !C::grouped);

    int acc[sets][C::tokens / 2];
    Place<C::stages> stage, running;
    Place<C::weight_slots> slot;

    // Adds the products of one k-block; its planes of w are in `a` while they run.
    __device__ __forceinline__ void add_block(unsigned (&a)[C::planes][4], const Shared<C, Shape>& shared, int row_tile,
                                              int lane) {
        barrier_wait<C::debug>(shared.weight_full(slot.index), slot.parity);
#pragma unroll
        for (int p = 0; p < C::planes; ++p) {
            const uint4 plane =
                load_shared_4(shared.weight(slot.index) + row_tile * Shape::tile_bytes + p * 512 + lane * 16);
            a[p][0] = plane.x, a[p][1] = plane.y, a[p][2] = plane.z, a[p][3] = plane.w;
        }

        barrier_wait<C::debug>(shared.x_full(stage.index), stage.parity);
        wgmma_fence();
        shared.release_weight(slot.index);  // the planes have come: only now may the copy engine overwrite them
        slot.advance();
#pragma unroll
        for (int q = 0; q < C::x_planes; ++q) {
            const unsigned long long b =
                core_matrices(shared.x(stage.index) + q * 2 * Shape::chunk_bytes, Shape::chunk_bytes, 128);
#pragma unroll
            for (int p = 0; p < C::planes; ++p) Wgmma<C::tokens>::b1(acc[p + q], a[p], b, 1);
        }
        wgmma_commit();
        stage.advance();
    }
    // The oldest block that was running is done.
    __device__ __forceinline__ void release(const Shared<C, Shape>& shared, int lane) {
        shared.release_x(running.index, lane);
        running.advance();
    }
};

// Arguments as of `gemm_wgmma`, x as planes, [KB][x_planes][2 halves][MT][8 tokens][16 bytes].
template <class C>
__global__ void __launch_bounds__(BinaryShape<C>::threads, C::resident)
    gemm_wgmma_b1(const uint4* weight, const unsigned char* x, const float* w_scale, const int* w_zero,
                  const int* w_centered_sum, const float* x_scale, const int* x_zero, const int* x_sum, const float* bias,
                  typename C::T* y, int M, int N, int KB, int MT) {
    using Shape = BinaryShape<C>;
    using T = typename C::T;
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    const Shared<C, Shape> shared{shared_address(dynamic_shared)};
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Tiles<C, Shape> tiles(M, N);

    shared.init_together();
    if (warpgroup == C::consumers) {
        produce(shared, tiles, weight, x, x_scale, x_zero, x_sum, N, KB, MT);
    } else {
        if constexpr (Shape::deals_registers) registers_raise<Shape::consumer_registers>();
        BinaryProducts<C> products;
        constexpr int sets = BinaryProducts<C>::sets;
        const int row_tile = warpgroup * 4 + warp;  // in the tile
        for (Place<2> buffer; tiles.any(); tiles.advance(), buffer.advance()) {
#pragma unroll
            for (int s = 0; s < sets; ++s) {
#pragma unroll
                for (int i = 0; i < C::tokens / 2; ++i) products.acc[s][i] = 0;
            }
            for (int kb = 0; kb < KB;) {
                unsigned a[2][C::planes][4];
                products.add_block(a[0], shared, row_tile, lane);
                if (++kb < KB) {
                    products.add_block(a[1], shared, row_tile, lane);
                    wgmma_wait<1>();
                    products.release(shared, lane);
                    ++kb;
                }
                wgmma_wait<0>();  // nothing runs across the loop's back edge: see wgmma_wait
                products.release(shared, lane);
            }
#pragma unroll
            for (int s = 0; s < sets; ++s) wgmma_fence_registers(products.acc[s]);

            barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);
            const int n0 = (tiles.row_tile0() + row_tile) * 16, n = n0 + lane / 4;
            const Row rows[2] = {{n, w_scale, w_zero, w_centered_sum, bias, N},
                                 {n + 8, w_scale, w_zero, w_centered_sum, bias, N}};
            write_out<C::tokens>(shared.out(), y, tiles.token0(), n0, M, N, [&](int j, float(&results)[4]) {
                int sums[4] = {0, 0, 0, 0};
#pragma unroll
                for (int s = 0; s < sets; ++s) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) sums[i] += products.acc[s][4 * j + i] << s;
                }
                per_channel(results, sums, rows, TokenPair<C::tokens>(shared.token_data(buffer.index, j, lane)));
            });
            shared.release_tokens(buffer.index);
        }
    }
}
