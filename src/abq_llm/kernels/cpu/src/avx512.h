// The vectors of AVX-512 with VNNI: one instruction multiplies a step of 16 rows by four columns of a token.
#pragma once

#include <immintrin.h>

#define VECTOR_BYTES 64
#include "attention.h"
#include "product.h"
#include "quantize.h"

namespace abq {
namespace {  // every level compiles its own copy

struct Avx512 {
    static constexpr int MOST_TOKENS = 16, MOST_TOKENS_A16 = 8;
    template <int P>
    static constexpr int CODE_OFFSET = 0;

    template <int P>
    static void dot(Ints& sums, Bytes codes, const int8_t* x) {
        const __m512i four = _mm512_set1_epi32(load<int32_t>(x));
        sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, four);
    }

    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
    }
    static Floats halves(const uint16_t* from) { return (Floats)_mm512_cvtph_ps(load<__m256i>(from)); }
    static void to_halves(Floats floats, uint16_t* to) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)floats, 0));
    }
};

}  // namespace
}  // namespace abq
