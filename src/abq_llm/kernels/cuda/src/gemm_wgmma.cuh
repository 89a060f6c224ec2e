// y[M, N] = x[M, K] w[N, K]^T on Hopper's warpgroup int8 products, for prefill: weights as bit-planes, 8-bit activations.
//
// y^T = w x^T: w is the operand in registers, so that its planes become bytes there and nowhere else (int8.cuh); x comes from
// shared memory as the quantizer wrote it. While the products of a warpgroup run, it makes the bytes of its next ones.
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

// C for fewer tokens
template <class C, int count> struct WithTokens : C {
    static constexpr int tokens = count;
};

template <class C> struct GemmArguments {
    const float* w_scale;
    const typename Either<C::grouped, unsigned char, int>::type* w_zero;
    const int* w_centered;
    const float* bias;
    typename C::T* y;
    int M, N, KB, groups;
};

// A warpgroup that multiplies: its 64 rows of tile after tile. Per channel it makes the bytes of the next products while others
// run, and up to two units of products are under way, so that the tensor cores have the second when the first ends. With groups,
// adding their sums takes longer than that, and the warpgroups take turns to start their products.
template <class C, class Shape> struct Consumer {
    static constexpr int unit = GroupRows<C>::steps, units = 8 / unit;  // steps whose products start together, of a k-block
    static constexpr bool ahead = !C::grouped;
    static_assert(C::stage_steps % unit == 0 && units % 2 == 0 && C::slabs == 1 && (!C::grouped || C::planes < 8));

    const Shared<C, Shape>& shared;
    const GemmArguments<C>& args;
    const int lane = threadIdx.x % 32, row_tile = threadIdx.x / 32;  // in the tile
    const Turns<C> turns;
    Place<C::stages> stage, running;  // of the next products, and of the oldest ones under way
    Place<C::weight_slots> slot;      // of the planes in registers
    Place<2> buffer;                  // of the tokens' data

    static __device__ __forceinline__ void make_bytes(unsigned (&a)[unit][4], const Planes<C>& planes, int first) {
#pragma unroll
        for (int i = 0; i < unit; ++i) {
#pragma unroll
            for (int r = 0; r < 4; ++r) a[i][r] = codes_of_step(planes.words[0][r], first + i);
            wgmma_fence_registers(a[i]);  // made here
        }
    }
    __device__ __forceinline__ void load(Planes<C>& planes) const {
        barrier_wait<C::debug>(shared.weight_full(slot.index), slot.parity);
        planes.load(shared.weight(slot.index) + row_tile * Shape::tile_bytes, lane);
    }
    // Not right after `load`: its reads may still be on their way, and the copy engine does not wait for them. When bytes have been
    // made of all planes, they have come.
    __device__ __forceinline__ void release_slot() {
        shared.release_weight(slot.index);
        slot.advance();
    }
    // The products of the steps before `end` of a k-block are done.
    __device__ __forceinline__ void release_x(int end) {
        if (end % C::stage_steps != 0) return;
        shared.release_x(running.index, lane);
        running.advance();
    }

    // Part: C, or C with the tokens of a part of a tile
    template <class Part> __device__ __forceinline__ void multiply(int row_tile0, int token0) {
        const int n0 = (row_tile0 + row_tile) * 16, n = n0 + lane / 4;
        const int rows = ceil_div(args.N, 16) * 16, row = min(n, rows - 16 + lane / 4);  // row tiles past the last one repeat it
        const unsigned token_data = shared.token_data(buffer.index, 0, lane);
        typename Either<C::grouped, GroupSums<Part>, Nothing>::type sums(args.w_scale, args.w_zero, args.w_centered, row, rows,
                                                                         args.groups);
        int acc[Part::tokens / 2];
        int accumulate = C::grouped;
        if constexpr (C::grouped) barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);

        Planes<C> planes;
        unsigned a[2][unit][4];  // of even and odd units
        if (ahead) load(planes), make_bytes(a[0], planes, 0);
        for (int kb = 0; kb < args.KB; ++kb) {
            if (!ahead) load(planes);
#pragma unroll
            for (int u = 0; u < units; ++u) {
                const int first = u * unit, end = first + unit;  // steps of 32 columns
                unsigned(&bytes)[unit][4] = a[u % 2];
                if constexpr (C::grouped) {
                    make_bytes(bytes, planes, first);
                    sums.prepare(bytes, acc, first, token_data + Part::tokens * 4);
#pragma unroll
                    for (int i = 0; i < unit; ++i) wgmma_fence_registers(bytes[i]);  // made before the turn comes
                    wgmma_fence_registers(acc);
                }
                if (u == 0) release_slot();
                if (first % C::stage_steps == 0) barrier_wait<C::debug>(shared.x_full(stage.index), stage.parity);
                if constexpr (C::grouped) turns.take();
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < unit; ++i) {
                    constexpr int chunk_bytes = Part::tokens * 16;
                    const int chunk = (first + i) % C::stage_steps * 2;
                    const unsigned long long b = core_matrices(shared.x(stage.index) + chunk * chunk_bytes, chunk_bytes, 128);
                    if constexpr (C::grouped) {
                        Wgmma<Part::tokens>::s8(acc, bytes[i], b, 1);
                    } else {
                        Wgmma<Part::tokens>::u8(acc, bytes[i], b, accumulate);
                    }
                    accumulate = 1;
                }
                wgmma_commit();
                if constexpr (C::grouped) turns.pass();
                if (end % C::stage_steps == 0) stage.advance();

                if (ahead && u > 0) {
                    wgmma_wait<1>();
                    release_x(first);
                }
                if (ahead && u + 1 < units) make_bytes(a[(u + 1) % 2], planes, end);
                if (ahead && u + 1 == units && kb + 1 < args.KB) load(planes), make_bytes(a[0], planes, 0);
                if (!ahead || u + 1 == units) {
                    wgmma_wait<0>();  // nothing runs across the loop's back edge: see wgmma_wait
                    wgmma_fence_registers(acc);
                    release_x(end);
                }
                if constexpr (C::grouped) {
                    if (sums.boundary(end)) sums.add(acc);
                }
            }
        }
        if constexpr (C::grouped && !GroupRows<C>::in_block) {
            if (sums.word < C::group_words) sums.add(acc);  // a last group that is short
        }

        if constexpr (C::grouped) {
            float biases[2];
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                biases[e] = args.bias ? __ldg(args.bias + min(n + 8 * e, args.N - 1)) : -0.0f;  // y + -0 = y
            }
            write_out<Part::tokens>(shared.out(), args.y, token0, n0, args.M, args.N, [&](int j, float(&results)[4]) {
                const int2 scale = load_shared_2(token_data + j * 32);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float sum = sums.result(4 * j + i, __int_as_float(i % 2 ? scale.y : scale.x));
                    results[i] = __fadd_rn(sum, biases[i / 2]);
                }
            });
        } else {
            barrier_wait<C::debug>(shared.tokens_full(buffer.index), buffer.parity);
            const Row both[2] = {{n, args.w_scale, args.w_zero, args.w_centered, args.bias, args.N},
                                 {n + 8, args.w_scale, args.w_zero, args.w_centered, args.bias, args.N}};
            TokenPair<Part::tokens> next(token_data);  // loaded before the results of those before it are stored
            write_out<Part::tokens>(shared.out(), args.y, token0, n0, args.M, args.N, [&](int j, float(&results)[4]) {
                const int products[4] = {acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]};
                const auto pair = next;
                if (j + 1 < Part::tokens / 8) next = TokenPair<Part::tokens>(token_data + (j + 1) * 32);
                per_channel(results, products, both, pair);
            });
        }
        shared.release_tokens(buffer.index);
        buffer.advance();
    }
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
    extern __shared__ __align__(128) unsigned char dynamic_shared[];
    const Shared<C, Shape> shared{shared_address(dynamic_shared)};
    Tiles<C, Shape> tiles(M, N);

    shared.init_together();
    if (threadIdx.x / 128 == C::consumers) {
        produce(shared, tiles, weight, x, x_scale, x_zero, x_sum, N, KB, MT);
    } else {
        if constexpr (Shape::deals_registers) registers_raise<Shape::consumer_registers>();
        const GemmArguments<C> args{w_scale, w_zero, w_centered, bias, y, M, N, KB, groups};
        Consumer<C, Shape> consumer{shared, args};
        if constexpr (C::grouped) consumer.turns.begin();
        for (; tiles.any_whole(); tiles.advance()) consumer.template multiply<C>(tiles.row_tile0(), tiles.token0());
        if constexpr (C::tail > 0) {
            for (; tiles.any(); tiles.advance()) {
                consumer.template multiply<WithTokens<C, C::tail>>(tiles.row_tile0(), tiles.token0());
            }
        }
        if constexpr (C::grouped) consumer.turns.end();
    }
}
