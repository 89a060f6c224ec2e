// What a block of `gemm_mma_f16` holds, and what a warp makes of a k-block.
//
// A lane has four neighbouring columns of the weight in a word, columns 4t .. 4t+3 of 16; the product wants 2t, 2t+1, 2t+8,
// 2t+9 of it. The order of columns is free as long as both have the same: so has x, by loads of four neighbours.
#pragma once
#include "bulk.cuh"
#include "centered.cuh"

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
    static constexpr int warps = C::warps_rows * C::warps_k * C::warps_tokens;
    static constexpr int threads = 32 * (warps + 2 * has_bulk_copies);
    static constexpr int row_tiles = C::warps_rows * C::row_tiles, rows = 16 * row_tiles;
    static constexpr int warp_tokens = C::tokens / C::warps_tokens, token_tiles = ceil_div(warp_tokens, 8);

    // The steps of a word one after the other, with sums of their own, where these are few: what they share stays in registers.
    // Groups must not begin inside a word.
    static constexpr bool aligned = 8 % C::group_words == 0 || C::group_words % 8 == 0;
    static constexpr int fields = Centered<typename C::T, C::planes, true>::fields;
    static constexpr bool by_word = aligned && fields > 1 && fields * C::row_tiles * token_tiles <= 8;
    using Codes = Centered<typename C::T, C::planes, by_word>;
    static constexpr int sets = by_word ? fields : C::row_tiles * token_tiles == 1 ? 2 : 1;  // of sums: products wait less

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

// What one warp does: row tiles and tokens of the block, a slice of the columns
template <class C> struct WarpPlace {
    int slice, row_tile, token;  // the first ones
    __device__ explicit WarpPlace(int warp)
        : slice(warp % C::warps_k), row_tile(warp / C::warps_k % C::warps_rows * C::row_tiles),
          token(warp / (C::warps_k * C::warps_rows) * MmaF16<C>::warp_tokens) {}
};

template <class C> struct WarpSums {
    using G = MmaF16<C>;
    using Codes = typename G::Codes;
    const Codes codes;
    float sum[G::sets][C::row_tiles][G::token_tiles][4] = {};
    float total[C::grouped ? C::row_tiles : 1][C::grouped ? G::token_tiles : 1][4] = {};  // of groups, scaled
    // Of rows g and g + 8, by field
    unsigned zero[Codes::fields][C::row_tiles][2];
    float scale[Codes::fields][C::row_tiles][2];

    __device__ float result(int r, int n, int i) const { return C::grouped ? total[r][n][i] : set_sum(r, n, i); }

    // One k-block, of which `steps` are there. `wait_for_tokens` returns when x is.
    template <class Wait>
    __device__ void add_block(const unsigned char* stage, WarpPlace<C> at, int kb, int steps, Wait wait_for_tokens) {
        constexpr int words = Codes::words;
        const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        unsigned word[C::row_tiles][4][words], ninth[C::row_tiles][4] = {};
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++) {
            const unsigned char* tile = stage + ((at.row_tile + r) * C::warps_k + at.slice) * G::plane_bytes;
            const uint4* planes = reinterpret_cast<const uint4*>(tile) + lane;
            load_planes<Codes::byte_planes>(word[r], planes);
            if constexpr (C::planes > 8) {
                const uint4 plane = planes[8 * 32];
                ninth[r][0] = plane.x, ninth[r][1] = plane.y, ninth[r][2] = plane.z, ninth[r][3] = plane.w;
            }
        }
        wait_for_tokens();

        const unsigned char* tokens[G::token_tiles];
#pragma unroll
        for (int n = 0; n < G::token_tiles; n++) {
            const int token = at.token + (C::tokens < 8 ? g % C::tokens : 8 * n + g);
            tokens[n] = stage + G::x_offset + token * G::x_pitch + at.slice * 512 + t * 8;
        }

        constexpr int group_apart = C::group_words < words ? C::group_words : words;  // words, where groups begin
        const int before = 8 % C::group_words == 0 ? 0 : 8 * kb % C::group_words;     // steps of the group in k-blocks before
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const int field = i % Codes::fields, step = G::by_word ? field * words + i / Codes::fields : i;
            if constexpr (C::grouped) {
                if (G::by_word ? step % group_apart == 0 : i == 0 || (before + i) % C::group_words == 0) {
                    const int slot = (before + step) / C::group_words;
                    start_group(stage, (at.slice * G::slots + slot) * G::rows + at.row_tile * 16 + g, field);
                }
            }
            if (C::full_blocks || step < steps) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    unsigned a[C::row_tiles][4];
#pragma unroll
                    for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            const int e = j % 2, source = 2 * h + e;
                            a[r][j] = codes.pair(word[r][source], ninth[r][source], step, j / 2, field, zero[field][r][e]);
                        }
#pragma unroll
                    for (int n = 0; n < G::token_tiles; n++) {
                        const uint2 b = *reinterpret_cast<const uint2*>(tokens[n] + step * 64 + h * 32);
#pragma unroll
                        for (int r = 0; r < C::row_tiles; r++)
                            mma_floats(typename C::T(), sum[G::by_word ? field : h % G::sets][r][n], a[r], b);
                    }
                }
            }
            if constexpr (C::grouped) {
                if (G::by_word ? (step + 1) % group_apart == 0 : i == 7 || (before + i + 1) % C::group_words == 0) end_group(field);
            }
        }
    }

  private:
    __device__ float set_sum(int r, int n, int i) const {
        float value = sum[0][r][n][i];
#pragma unroll
        for (int set = 1; set < G::sets; set++) value += sum[set][r][n][i];
        return value;
    }
    __device__ void start_group(const unsigned char* stage, int first, int field) {
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int row = first + 16 * r + 8 * e;
                zero[field][r][e] = Codes::zero(stage[G::zero_offset + row], field);
                scale[field][r][e] = reinterpret_cast<const float*>(stage + G::scale_offset)[row];
            }
    }
    __device__ void end_group(int field) {
#pragma unroll
        for (int r = 0; r < C::row_tiles; r++)
#pragma unroll
            for (int n = 0; n < G::token_tiles; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    total[r][n][i] += scale[field][r][i / 2] * (G::by_word ? sum[field][r][n][i] : set_sum(r, n, i));
#pragma unroll
                    for (int set = 0; set < G::sets; set++)
                        if (!G::by_word || set == field) sum[set][r][n][i] = 0;
                }
    }
};
