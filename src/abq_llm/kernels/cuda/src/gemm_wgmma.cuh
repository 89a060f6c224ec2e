// y[M, N] = x[M, K] w[N, K]^T on Hopper's warpgroup int8 products, for prefill: weights as bit-planes, 8-bit activations.
//
// y^T = w x^T: w is the operand in registers, so that its planes become bytes there and nowhere else (int8.cuh); x comes from
// shared memory as the quantizer wrote it. While the products of one warpgroup run, another makes its next bytes.
#pragma once
#include "wgmma_weights.cuh"

template <class C> using GemmShape = Tile<C, 16, 2 * C::stage_steps, C::grouped ? 2 : 3>;

// Sums over groups, of the rows n, n + 8 of one lane and the tokens of the tile, in the reference's order and with its roundings:
//
//     total += float(v) * scale      with the exact v = sum_k (q_w - z_w) (q_x - z_x)
//
// The bytes of the weights are q_w - z_w, those of x are q_x; the rest of v, -z_x sum_k (q_w - z_w), is where the accumulators
// start, with 2^23 more. So they end as the bits of the float (2^23 + v) 2^-149, as |v| < 2^23: no conversion is needed, and
//
//     fma((2^23 + v) 2^-149, scale 2^100, -scale 2^-26) = v scale 2^-49
//
// rounds just once, like the product in the reference. The powers of two are exact; the last one leaves with the result.
template <class C> struct GroupSums : GroupRows<C> {
    static constexpr int steps = GroupRows<C>::steps;
    static constexpr float scale_up = 0x1p100f, scale_down = 0x1p-26f, total_up = 0x1p49f;

    float total[C::tokens / 2];

    __device__ GroupSums(const float* w_scale, const unsigned char* w_zero, const int* w_total, int row, int rows, int groups)
        : GroupRows<C>(w_scale, w_zero, w_total, row, rows, groups) {
#pragma unroll
        for (int i = 0; i < C::tokens / 2; ++i) total[i] = 0;
    }
    // Codes become centered; where a group starts, the accumulators, too. `x_zeros`: where the tokens' zero points lie
    __device__ __forceinline__ void prepare(unsigned (&a)[steps][4], int (&acc)[C::tokens / 2], int step, unsigned x_zeros) {
        if (this->boundary(step)) {
            this->start();
#pragma unroll
            for (int j = 0; j < C::tokens / 8; ++j) {
                const int2 z = load_shared_2(x_zeros + j * 32);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    acc[4 * j + i] = (1 << 23) - this->totals[i / 2] * (i % 2 ? z.y : z.x);
                }
            }
        }
        this->word += steps;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const unsigned minus = unsigned(this->zeros[e]) * 0x01010101u;
#pragma unroll
            for (int i = 0; i < steps; ++i) {
                a[i][e] = subtract_bytes(a[i][e], minus);
                a[i][e + 2] = subtract_bytes(a[i][e + 2], minus);
            }
        }
    }
    // At the end of a group
    __device__ __forceinline__ void add(const int (&acc)[C::tokens / 2]) {
        const float up[2] = {this->scales[0] * scale_up, this->scales[1] * scale_up};
        const float down[2] = {-this->scales[0] * scale_down, -this->scales[1] * scale_down};
#pragma unroll
        for (int i = 0; i < C::tokens / 2; ++i) {
            const int e = i / 2 % 2;
            total[i] = __fadd_rn(total[i], __fmaf_rn(__int_as_float(acc[i]), up[e], down[e]));
        }
    }
    __device__ float result(int i, float x_scale) const { return __fmul_rn(total[i] * total_up, x_scale); }

    // Byte by byte, both below 128
    static __device__ unsigned subtract_bytes(unsigned a, unsigned b) { return ((a | 0x80808080u) - b) ^ 0x80808080u; }
};

// blocks: at most as many as tiles of y, which they share. MT, the token tiles of 8 that x has, is a multiple of
// tokens / 8. If grouped, w_scale, w_zero and w_centered are [groups][...], and x_sum is not read.
template <class C>
__global__ void __launch_bounds__(GemmShape<C>::threads, C::resident)
    gemm_wgmma(const uint4* weight, const unsigned char* x, const float* w_scale,
               const typename Either<C::grouped, unsigned char, int>::type* w_zero, const int* w_centered,
               const float* x_scale, const int* x_zero, const int* x_sum, const float* bias, typename C::T* y, int M, int N,
               int KB, int MT, int groups) {
    using Shape = GemmShape<C>;
    using T = typename C::T;
    constexpr int unit = GroupRows<C>::steps;
    static_assert(C::stage_steps % unit == 0 && (!C::grouped || (C::slabs == 1 && C::planes < 8)));
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    const Shared<C, Shape> shared{shared_address(dynamic_shared)};
    const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    Tiles<C, Shape> tiles(M, N);

    shared.init_together();
    if (warpgroup == C::consumers) {
        produce(shared, tiles, weight, x, x_scale, x_zero, x_sum, N, KB, MT);
    } else {
        if constexpr (Shape::deals_registers) registers_raise<Shape::consumer_registers>();
        const int row_tile = warpgroup * C::slabs * 4 + warp;  // in the tile, of slab 0
        Place<C::stages> stage;
        Place<C::weight_slots> slot;
        const Turns<C> turns;
        turns.begin();
        for (Place<2> buffer; tiles.any(); tiles.advance(), buffer.advance()) {
            const int token0 = tiles.token0(), n0 = (tiles.row_tile0() + row_tile) * 16, n = n0 + lane / 4;  // of slab 0
            const int rows = ceil_div(N, 16) * 16;
            const unsigned token_data = shared.token_data(buffer.index, 0, lane);
            int acc[C::slabs][C::tokens / 2];
            int accumulate = C::grouped;
            // Row tiles past the last one repeat it
            const int row = min(n, rows - 16 + lane / 4);
            typename Either<C::grouped, GroupSums<C>, Nothing>::type sums(w_scale, w_zero, w_centered, row, rows, groups);
            if constexpr (C::grouped) barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);

            for (int kb = 0; kb < KB; ++kb) {
                Planes<C> planes;
                barrier_wait<C::debug>(shared.weight_full(slot.index), slot.parity);
                planes.load(shared.weight(slot.index) + row_tile * Shape::tile_bytes, lane);
                __syncwarp();
                if (lane == 0) barrier_arrive(shared.weight_empty(slot.index));
                slot.advance();

#pragma unroll
                for (int first = 0; first < 8; first += unit) {  // steps of 32 columns
                    unsigned a[C::slabs][unit][4];
#pragma unroll
                    for (int slab = 0; slab < C::slabs; ++slab) {
#pragma unroll
                        for (int i = 0; i < unit; ++i) {
#pragma unroll
                            for (int r = 0; r < 4; ++r) a[slab][i][r] = codes_of_step(planes.words[slab][r], first + i);
                        }
                    }
                    if constexpr (C::grouped) sums.prepare(a[0], acc[0], first, token_data + C::tokens * 4);
#pragma unroll
                    for (int slab = 0; slab < C::slabs; ++slab) {
#pragma unroll
                        for (int i = 0; i < unit; ++i) wgmma_fence_registers(a[slab][i]);  // made before the turn comes
                        if constexpr (C::grouped) wgmma_fence_registers(acc[slab]);
                    }
                    if (first % C::stage_steps == 0) barrier_wait<C::debug>(shared.x_full(stage.index), stage.parity);

                    turns.take();
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < unit; ++i) {
                        const int chunk = (first + i) % C::stage_steps * 2;
                        const unsigned long long b = core_matrices(
                            shared.x(stage.index) + chunk * Shape::chunk_bytes, Shape::chunk_bytes, 128);
#pragma unroll
                        for (int slab = 0; slab < C::slabs; ++slab) {
                            if constexpr (C::grouped) {
                                Wgmma<C::tokens>::s8(acc[slab], a[slab][i], b, 1);
                            } else {
                                Wgmma<C::tokens>::u8(acc[slab], a[slab][i], b, accumulate);
                            }
                        }
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
                    if constexpr (C::grouped) {
                        if (sums.boundary(first + unit)) sums.add(acc[0]);
                    }
                }
            }
            if constexpr (C::grouped && !GroupRows<C>::in_block) {
                if (sums.word < C::group_words) sums.add(acc[0]);  // a last group that is short
            }

            if constexpr (!C::grouped) barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);
            const unsigned out = shared.out();
            if constexpr (C::grouped) {
                float biases[2];
#pragma unroll
                for (int e = 0; e < 2; ++e) biases[e] = bias ? __ldg(bias + min(n + 8 * e, N - 1)) : -0.0f;  // y + -0 = y
                write_out<C::tokens>(out, y, token0, n0, M, N, [&](int j, float(&results)[4]) {
                    const int2 scale = load_shared_2(token_data + j * 32);
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const float sum = sums.result(4 * j + i, __int_as_float(i % 2 ? scale.y : scale.x));
                        results[i] = __fadd_rn(sum, biases[i / 2]);
                    }
                });
            } else {
#pragma unroll
                for (int slab = 0; slab < C::slabs; ++slab) {
                    const Row rows[2] = {{n + slab * 64, w_scale, w_zero, w_centered, bias, N},
                                         {n + slab * 64 + 8, w_scale, w_zero, w_centered, bias, N}};
                    write_out<C::tokens>(out, y, token0, n0 + slab * 64, M, N, [&](int j, float(&results)[4]) {
                        const int(&d)[C::tokens / 2] = acc[slab];
                        const int products[4] = {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
                        per_channel<C::tokens>(results, products, rows, shared.token_data(buffer.index, j, lane));
                    });
                }
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(shared.tokens_empty(buffer.index));
        }
        turns.end();
    }
}
