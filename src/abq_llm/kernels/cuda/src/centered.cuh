// Words of `planes_to_steps` -> q - z as pairs of T, exactly, for up to nine planes.
//
//     step (32 columns) of a word        .. byte 1 ..   .. byte 0 ..        four planes: two fields a byte
//                                         hhhh llll      hhhh llll
//     fp16 holds a byte and its base      1024 + 16 h + l, twice
//     a field, and its zero point         (16 h) / 16 - z, l - z            so fields come apart in floats, not in integers,
//                                                                           whose instructions take twice as long
//
// In bf16, which holds seven bits and its base, they come apart as integers (`codes_of_step`). Codes of eight planes are
// centered in fp16: |q - z| up to 256 is exact in bf16, too.
#pragma once
#include "int8.cuh"
#include "pairs.cuh"

__device__ inline unsigned multiply_add_halves(unsigned a, unsigned b, unsigned c) {
    unsigned result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

__device__ inline unsigned bf16_pair(unsigned pair) {  // of a pair of fp16
    const float low = to_float(half_t{(unsigned short)pair}), high = to_float(half_t{(unsigned short)(pair >> 16)});
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

// `in_floats`: fields of a byte come apart so, where T allows it
template <class T, int planes, bool in_floats> struct Centered {
    static constexpr int byte_planes = planes < 8 ? planes : 8, words = power_of_two_above(byte_planes);
    using In = typename Either<(1 << planes) - 1 <= Pairs<T>::most, T, half_t>::type;
    static constexpr int fields = in_floats && Pairs<T>::most > 255 ? 8 / words : 1;

    const unsigned base = unknown_constant(Pairs<In>::base);

    // What `pair` wants to know of a zero point
    static __device__ unsigned zero(int z, int field) {
        if (fields == 2 && field == 1) return Pairs<In>::subtract(Pairs<In>::base, zero_pair<In>(z));
        if (fields == 1) return zero_pair<In>(z);
        const int shift = field * words;  // -(2^(10 - shift) + z), in units of 2^-shift
        return (0x8000u | unsigned(25 - shift) << 10) * 0x10001u + unsigned(z) * (0x10001u << shift);
    }

    // Columns 0 and 1 (half 0) or 2 and 3 (half 1) of a lane's four in `step`, whose field is `field`; `ninth`: its last plane
    __device__ unsigned pair(const unsigned (&word)[words], unsigned ninth, int step, int half, int field, unsigned zero) const {
        if constexpr (fields > 1) {
            const unsigned bytes = pair_of_bytes(word[step % words], half, base), first = bytes & mask(0);
            const unsigned scale = unsigned(15 - field * words) << 10;  // 2^-shift
            const unsigned value = field == 0 ? first : fields == 2 ? Pairs<In>::subtract(bytes, first) : bytes & mask(field);
            return multiply_add_halves(value, scale * 0x10001u, zero);
        } else {
            const unsigned codes = codes_of_step(word, step);
            unsigned result;
            if constexpr (planes > 8)
                result = Pairs<In>::subtract(__byte_perm(codes, ninth >> step & 0x01010101u, half ? 0x7362 : 0x5140) | base, zero);
            else
                result = centered_pair<In>(codes, half, zero, base);
            if constexpr (Pairs<T>::most < Pairs<In>::most) result = bf16_pair(result);
            return result;
        }
    }

  private:
    static __device__ constexpr unsigned mask(int field) { return 0xFF00FF00u | (((1u << words) - 1) << field * words) * 0x10001u; }
};
