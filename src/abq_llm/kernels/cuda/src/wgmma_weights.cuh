// What the products of expanded weights share: the planes of a k-block in registers, and the rows' scales group by group.
#pragma once
#include "int8.cuh"
#include "wgmma_tile.cuh"

struct Nothing {
    template <class... Any> __device__ Nothing(Any...) {}
};

__device__ constexpr int greatest_divisor(int a, int b) { return b == 0 ? a : greatest_divisor(b, a % b); }

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

// Of the rows n, n + 8 of one lane, group by group: scales, zero points, and `totals`, sums of q - z
template <class C> struct GroupRows {
    static constexpr int steps = greatest_divisor(C::group_words, C::unit);  // that end with a group, or inside
    static constexpr bool in_block = 8 % C::group_words == 0;                // every k-block begins with a group

    float scales[2], next_scales[2];
    int zeros[2], next_zeros[2], totals[2], next_totals[2];
    const float* scale;  // [groups][rows]
    const unsigned char* zero;
    const int* total;
    int at, rows, groups;  // `at`: the next group's, row n
    int group = -1, word = C::group_words;  // the present one, and steps of it so far

    __device__ GroupRows() {}
    __device__ GroupRows(const float* w_scale, const unsigned char* w_zero, const int* w_total, int row, int rows, int groups)
        : scale(w_scale), zero(w_zero), total(w_total), at(row), rows(rows), groups(groups) {
        load_next();
    }
    __device__ void load_next() {  // long before they are used
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const bool any = group + 1 < groups;  // zeros for the filling after the last one
            next_scales[e] = any ? __ldg(scale + at + 8 * e) : 0;
            next_zeros[e] = any ? __ldg(zero + at + 8 * e) : 0;
            next_totals[e] = any ? __ldg(total + at + 8 * e) : 0;
        }
        at += rows;
    }
    // Whether a group ends before this step of the k-block, and one starts
    __device__ bool boundary(int step) const { return in_block ? step % C::group_words == 0 : word == C::group_words; }
    __device__ void start() {
        ++group, word = 0;
#pragma unroll
        for (int e = 0; e < 2; ++e) scales[e] = next_scales[e], zeros[e] = next_zeros[e], totals[e] = next_totals[e];
        load_next();
    }
};
