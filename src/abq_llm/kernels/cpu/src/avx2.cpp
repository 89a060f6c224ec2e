// AVX2: codes meet tokens by `maddubs`, whose sums of two products must fit 16 bits.
#if defined(__AVX2__)
#include <immintrin.h>

#define VECTOR_BYTES 32
#include "attention.h"
#include "product.h"
#include "quantize.h"

namespace abq {
namespace {

struct Avx2 {
    static constexpr int MOST_TOKENS = 4, MOST_TOKENS_A16 = 1;
    template <int P>
    static constexpr int CODE_OFFSET = 0;

    // 127 * 128 * 2 fits, 255 * 128 * 2 does not: codes of 8 bits go in two parts, 7 bits and the top one.
    template <int P>
    static void dot(Ints& sums, Bytes codes, const int8_t* x) {
        const __m256i four = _mm256_set1_epi32(load<int32_t>(x));
        if constexpr (P == 8) {
            add(sums, field<7, 1>(codes), four, 128);
            add(sums, field<0, 127>(codes), four, 1);
        } else {
            add(sums, codes, four, 1);
        }
    }
    static void add(Ints& sums, Bytes codes, __m256i four, int16_t times) {
        const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, four);
        sums += (Ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(times));
    }

    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
    }
    static Floats halves(const uint16_t* from) { return (Floats)_mm256_cvtph_ps(load<__m128i>(from)); }
    static void to_halves(Floats floats, uint16_t* to) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)floats, 0));
    }
};

bool supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

}  // namespace

const Level avx2{"avx2", supported,  width_of<Avx2>, quantize,       product_of<Avx2>,
                   norm,     swiglu, dense<Avx2>, append<Avx2>, attend<Avx2>};

}  // namespace abq
#endif
